"""Layers: NNX modules that describe parameters and call pure operations."""

from lcm.nn.attention import Attention, reach
from lcm.nn.bias import BIASES
from lcm.nn.block import MIXERS, MLPS, Block, flops, flops_by_part, init_state, layer, whole
from lcm.nn.cache import KVCache, PagedKVCache
from lcm.nn.dense import dense
from lcm.nn.embedding import Embedding, Head, logits, tied_logits
from lcm.nn.norm import NORMS, RMSNorm
from lcm.nn.recurrent import RecurrentState
from lcm.nn.spec import LayerSpec

__all__ = [
    "BIASES",
    "MIXERS",
    "MLPS",
    "NORMS",
    "Attention",
    "Block",
    "Embedding",
    "Head",
    "KVCache",
    "LayerSpec",
    "PagedKVCache",
    "RMSNorm",
    "RecurrentState",
    "dense",
    "flops",
    "flops_by_part",
    "init_state",
    "layer",
    "logits",
    "reach",
    "tied_logits",
    "whole",
]
