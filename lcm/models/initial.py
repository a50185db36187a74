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
    that are one document, or made so by `joined`; of texts that go on, this is truncated
    backpropagation through time.
    """
    return jax.lax.stop_gradient(state)


def fitted(state: State) -> Fit:
    """Moments of final states over rows and the numbers of a head (fitted noise, section 4)."""
    numbers = jax.tree.map(_by_head, _memories(state))
    mean = jax.tree.map(lambda x: x.mean((1, 3)), numbers)
    return Fit(mean, jax.tree.map(lambda x: x.std((1, 3)), numbers))


def drawn(key: jax.Array, fit: Fit, state: State, segment: int = 1) -> State:
    """The state with memories drawn from `N(mean, std^2)` of their head, rows being in `segment`.

    The last inputs of convolutions stay as they are.
    """
    like = _memories(state)
    leaves, tree = jax.tree.flatten(like)
    keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(leaves))))

    def draw(key: jax.Array, mean: Array, std: Array, x: Array) -> Array:
        normal = _by_head(jax.random.normal(key, x.shape, x.dtype))
        own = mean[:, None, :, None] + std[:, None, :, None] * normal
        return own.reshape(x.shape)

    memories = jax.tree.map(draw, keys, fit.mean, fit.std, like)
    return _with(state, memories, segment)


def rows(state: State, row_B: Array) -> State:
    """The states of some rows, in any order."""
    layers = jax.tree.map(lambda x: x[:, row_B], state.layers)
    return State(state.used_B[row_B], layers)


def joined(state: State, segment_B: Array) -> State:
    """The state as that of a token of these segments, so that tokens of them go on from it."""

    def change(layer: Any) -> Any:
        if not isinstance(layer, RecurrentState):
            return layer
        own = jnp.broadcast_to(segment_B, layer.segment_B.shape)
        return RecurrentState(layer.memory, layer.tails, own)

    return State(state.used_B, tuple(map(change, state.layers)))


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
        return (_by_head(x) * share[..., None]).reshape(x.shape)

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


def _by_head(x: Array) -> Array:
    """Numbers of each head, `[n, B, H, -1]`; those of a layer without heads as of one."""
    heads = 1 if x.ndim == 3 else x.shape[2]
    return x.reshape(*x.shape[:2], heads, -1)


def _norm(x: Array) -> Array:
    return jnp.sqrt((_by_head(x) ** 2).sum(-1))
