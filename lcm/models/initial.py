"""States of recurrent layers from outside the layers: passed on, fitted, drawn, held in bounds.

A recurrent model that is trained from empty states alone has seen only those that so many tokens
reach from nothing, and fails where longer texts take it (Ruiz and Gu, 2025, arXiv:2507.02782).
These are functions on the state of a decoder, the same for every mixer. Keys and values of
attention are no such states and are left as they are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcm.models.decoder import State
from lcm.nn import RecurrentState
from lcm.types import Array


class Fit(NamedTuple):
    """Mean and standard deviation of each head of each layer: trees of `[n, H]` for arrays of
    states `[n, B, H, ...]`, n layers of a kind; `[n, 1]` of states without heads, `[n, B, M]`."""

    mean: Any
    std: Any


def passed(state: State) -> State:
    """A state that the next rows may begin with, through which no gradient goes.

    For those to go on from it they must be of the segment of its last token, which is 1 in rows
    that are one document; of texts that go on, this is truncated backpropagation through time.
    """
    return jax.lax.stop_gradient(state)


def fitted(state: State) -> Fit:
    """Moments of final states over rows and the numbers of a head (fitted noise, section 4)."""
    arrays = _memories(state)
    return Fit(*(jax.tree.map(moment, arrays) for moment in (_mean, _std)))


def drawn(key: jax.Array, fit: Fit, state: State, segment: int = 1) -> State:
    """The state with memories drawn from `N(mean, std^2)` of their head, rows being in `segment`.

    The last inputs of convolutions stay as they are.
    """
    like = _memories(state)
    leaves, tree = jax.tree.flatten(like)
    keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(leaves))))

    def draw(key: jax.Array, mean: Array, std: Array, x: Array) -> Array:
        wide = (*mean.shape[:1], 1, *mean.shape[1:], *[1] * (x.ndim - mean.ndim - 1))
        normal = jax.random.normal(key, x.shape, x.dtype)
        return mean.reshape(wide) + std.reshape(wide) * normal

    memories = jax.tree.map(draw, keys, fit.mean, fit.std, like)
    return _with(state, memories, segment)


def norms(state: State) -> Any:
    """Frobenius norms of the states of heads, `[n, B, H]`, as a tree of arrays."""
    return jax.tree.map(_norm, _memories(state))


def normalised(state: State, most: Any) -> State:
    """The state with no head's norm above `most`, a tree as `norms` gives it or one that
    broadcasts with it: `h most / |h|` where it is (Chen et al., 2024, arXiv:2410.07145v1, 4.2).

    To be applied between chunks of tokens. The authors' code multiplies by `|h| / most`, which
    makes states grow; this is the paper's formula.
    """

    def shrink(x: Array, most: Array) -> Array:
        norm = _norm(x)
        share = jnp.minimum(1.0, most / jnp.maximum(norm, jnp.finfo(x.dtype).tiny))
        return x * share.reshape(*share.shape, *[1] * (x.ndim - share.ndim))

    return _with(state, jax.tree.map(shrink, _memories(state), most))


def _memories(state: State) -> list[Any]:
    return [layer.memory for layer in state.layers if isinstance(layer, RecurrentState)]


def _with(state: State, memories: list[Any], segment: int | None = None) -> State:
    left = iter(memories)

    def change(layer: Any) -> Any:
        if not isinstance(layer, RecurrentState):
            return layer
        own = layer.segment_B
        own = own if segment is None else jnp.full_like(own, segment)
        return RecurrentState(next(left), layer.tails, own)

    return State(state.used_B, tuple(map(change, state.layers)))


def _inside(x: Array) -> tuple[int, ...]:
    """The axes of one head's numbers in `[n, B, H, ...]`, or of a layer's in `[n, B, M]`."""
    return tuple(range(2 if x.ndim == 3 else 3, x.ndim))


def _mean(x: Array) -> Array:
    found = x.mean((1, *_inside(x)))
    return found[:, None] if x.ndim == 3 else found


def _std(x: Array) -> Array:
    found = x.std((1, *_inside(x)))
    return found[:, None] if x.ndim == 3 else found


def _norm(x: Array) -> Array:
    found = jnp.sqrt((x * x).sum(_inside(x)))
    return found[..., None] if x.ndim == 3 else found
