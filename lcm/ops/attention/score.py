"""Score modifications: traced functions of a score and its place, whose parameters get gradients.

A score modification is a registered dataclass whose fields are its parameters, called as
`mod(score, q_position, k_position, head)` with arguments that broadcast against each other. A
backend may call it on a whole score tensor or on one tile of one head, so it must be elementwise.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from lcm.types import Array


class ScoreMod(Protocol):
    """float32 scores in, float32 scores out; positions and head are int32."""

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearBias:
    """`score - slope_h (i - j)`: ALiBi (Press et al., arXiv:2108.12409).

    Distances stay integers until the product.
    """

    slopes_H: Array

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return score - self.slopes_H[head] * (q_pos - k_pos).astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftCap:
    """`cap tanh(score / cap)` (Gemma 2, arXiv:2408.00118)."""

    cap: float

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return self.cap * jnp.tanh(score / self.cap)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compose:
    """Modifications applied in the order given."""

    mods: tuple[ScoreMod, ...]

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        for mod in self.mods:
            score = mod(score, q_pos, k_pos, head)
        return score


def compose(*mods: ScoreMod | None) -> ScoreMod | None:
    """One modification for several, leaving out `None`; `None` if nothing is left."""
    given = tuple(mod for mod in mods if mod is not None)
    return given[0] if len(given) == 1 else Compose(given) if given else None
