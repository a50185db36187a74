"""Attention as a merge of parts."""

from lcm.ops.attention.api import BACKENDS, attend, attend_partial
from lcm.ops.attention.biases import (
    BucketBias,
    CappedBias,
    CosineBias,
    FireBias,
    Local,
    LogBias,
    LogSquareBias,
    PowerBias,
    Scale,
    Within,
    t5_starts,
)
from lcm.ops.attention.blocks import BlockMap
from lcm.ops.attention.mask import Mask, causal, chunks, prefix, sinks, visible, window
from lcm.ops.attention.normaliser import Normaliser, Softmax, SoftmaxSink, Softplus
from lcm.ops.attention.part import Part, Partial, merge
from lcm.ops.attention.patterns import bigbird, vertical_slash
from lcm.ops.attention.score import Compose, LinearBias, ScoreMod, SoftCap, compose
from lcm.ops.attention.spread import METHODS, ORDERS, Spread

__all__ = [
    "BACKENDS",
    "METHODS",
    "ORDERS",
    "BlockMap",
    "BucketBias",
    "CappedBias",
    "Compose",
    "CosineBias",
    "FireBias",
    "LinearBias",
    "Local",
    "LogBias",
    "LogSquareBias",
    "Mask",
    "Normaliser",
    "Part",
    "Partial",
    "PowerBias",
    "Scale",
    "ScoreMod",
    "SoftCap",
    "Softmax",
    "SoftmaxSink",
    "Softplus",
    "Spread",
    "Within",
    "attend",
    "attend_partial",
    "bigbird",
    "causal",
    "chunks",
    "compose",
    "merge",
    "prefix",
    "sinks",
    "t5_starts",
    "vertical_slash",
    "visible",
    "window",
]
