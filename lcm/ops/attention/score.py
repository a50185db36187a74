"""Score modifications: traced functions of a score and its place, whose parameters get gradients.

A score modification is a registered dataclass whose fields are its parameters, called as
`mod(score, q_position, k_position, head)` with arguments that broadcast against each other. A
backend may call it on a whole score tensor or on one tile of one head, so it must be elementwise.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from lcm.types import Array


@runtime_checkable
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


@dataclasses.dataclass(frozen=True)
class Leaves:
    """The form of a tree of score modifications without its arrays; static under `jax.jit`."""

    tree: Any
    floating: tuple[bool, ...]

    def join(self, weights: tuple[Array, ...], constants: tuple[Array, ...]) -> Any:
        """The tree again, around the arrays that `split` took out."""
        given, fixed = iter(weights), iter(constants)
        leaves = [next(given if is_float else fixed) for is_float in self.floating]
        return jax.tree.unflatten(self.tree, leaves)


def split(mods: Any) -> tuple[Leaves, tuple[Array, ...], tuple[Array, ...]]:
    """A tree of modifications as its form, its parameters and its arrays without a gradient."""
    leaves, tree = jax.tree.flatten(mods)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    floating = tuple(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)
    weights = tuple(leaf for leaf, is_float in zip(leaves, floating, strict=True) if is_float)
    constants = tuple(leaf for leaf, is_float in zip(leaves, floating, strict=True) if not is_float)
    return Leaves(tree, floating), weights, constants
