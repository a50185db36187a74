"""Position encodings: frozen dataclasses behind one interface."""

from lcm.positions.absolute import Countdown, Learned, NoPE, Sinusoidal, countdown_scale
from lcm.positions.alibi import ALiBi
from lcm.positions.base import Dims, PositionEncoding
from lcm.positions.chain import Chain
from lcm.positions.registry import ENCODINGS, config, make
from lcm.positions.rope import RoPE

__all__ = [
    "ENCODINGS",
    "ALiBi",
    "Chain",
    "Countdown",
    "Dims",
    "Learned",
    "NoPE",
    "PositionEncoding",
    "RoPE",
    "Sinusoidal",
    "config",
    "countdown_scale",
    "make",
]
