"""Decoding: from logits to tokens, and from tokens to text."""

from lcm.decoding.history import History, begin, insert, observe, take
from lcm.decoding.processors import Chain, chain, process
from lcm.decoding.sampling import Drawn, draw, keys, sample
from lcm.decoding.settings import Plan, Sampling, plan
from lcm.decoding.text import TextStream

__all__ = [
    "Chain",
    "Drawn",
    "History",
    "Plan",
    "Sampling",
    "TextStream",
    "begin",
    "chain",
    "draw",
    "insert",
    "keys",
    "observe",
    "plan",
    "process",
    "sample",
    "take",
]
