"""A part of an attention: its own queries, keys, mask and score modification over shared values."""

import dataclasses

import jax

from lcm.ops.attention.mask import Mask, causal
from lcm.ops.attention.score import ScoreMod
from lcm.types import Keys, Queries


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Rotated queries and keys with the keys they may see; the mask is static under `jax.jit`."""

    q_BLHK: Queries
    k_BSGK: Keys
    mask: Mask = dataclasses.field(default=causal(), metadata={"static": True})
    score_mod: ScoreMod | None = None
