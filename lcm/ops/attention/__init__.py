"""Attention as a merge of parts."""

from lcm.ops.attention.api import BACKENDS, attend, attend_partial
from lcm.ops.attention.mask import Mask, causal, chunks, prefix, sinks, visible, window
from lcm.ops.attention.part import Part, Partial, merge
from lcm.ops.attention.score import Compose, LinearBias, ScoreMod, SoftCap, compose

__all__ = [
    "BACKENDS",
    "Compose",
    "LinearBias",
    "Mask",
    "Part",
    "Partial",
    "ScoreMod",
    "SoftCap",
    "attend",
    "attend_partial",
    "causal",
    "chunks",
    "compose",
    "merge",
    "prefix",
    "sinks",
    "visible",
    "window",
]
