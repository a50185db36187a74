"""Attention as a merge of parts."""

from lcm.ops.attention.api import BACKENDS, attend
from lcm.ops.attention.mask import Mask, causal, chunks, prefix, sinks, visible, window
from lcm.ops.attention.part import Part
from lcm.ops.attention.score import Compose, LinearBias, ScoreMod, SoftCap, compose

__all__ = [
    "BACKENDS",
    "Compose",
    "LinearBias",
    "Mask",
    "Part",
    "ScoreMod",
    "SoftCap",
    "attend",
    "causal",
    "chunks",
    "compose",
    "prefix",
    "sinks",
    "visible",
    "window",
]
