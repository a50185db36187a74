"""A sequence in chunks, and a scan over them that keeps little for its backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lcm.ops.platform import platform
from lcm.types import Array

# `body(state, shared, moving) -> (state, y)`.
Body = Callable[[Any, Any, Any], tuple[Any, Any]]


def chunk_of(given: int, on_cpu: int, elsewhere: int) -> int:
    """The tokens of a chunk: those that are given, or 0 for what suits the device.

    Raises:
        ValueError: for less.
    """
    if given < 0:
        raise ValueError(f"chunk={given} is negative: give a number of tokens, or 0 to choose it")
    return given or (on_cpu if platform() == "cpu" else elsewhere)


def in_chunks(
    body: Body, size: int, moving: Any, shared: Any, state: Any, *, multiple: int = 1
) -> tuple[Array, Any]:
    """Outputs `[B, L, ...]`, and the last state, of `body` over chunks of the tokens in turn.

    size: tokens of a chunk, which is one of all of them if there are no more; multiple: of what
        number of tokens chunks have to be, whichever size they are given.
    moving: arrays `[B, L, ...]`, of which the body sees `[B, C, ...]`, zeros behind the last.
    shared: what it sees in each chunk.
    """
    length = jax.tree.leaves(moving)[0].shape[1]
    size = -(-min(size, length) // multiple) * multiple
    state, y = scan(body, state, shared, jax.tree.map(lambda x: chunked(x, size), moving))
    return joined(y, length), state


def chunked(x_BL: Array, chunk: int) -> Array:
    """`[B, L, ...]` as `[N, B, C, ...]`, the last chunk filled up with zeros."""
    batch, length, *rest = x_BL.shape
    missing = -length % chunk
    if missing:
        x_BL = jnp.pad(x_BL, [(0, missing if axis == 1 else 0) for axis in range(x_BL.ndim)])
    return x_BL.reshape(batch, -1, chunk, *rest).swapaxes(0, 1)


def joined(x_NBC: Array, length: int) -> Array:
    """The `[B, L, ...]` of `chunked`."""
    _, batch, _, *rest = x_NBC.shape
    return x_NBC.swapaxes(0, 1).reshape(batch, -1, *rest)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(body: Body, state: Any, shared: Any, moving: Any) -> tuple[Any, Any]:
    """`jax.lax.scan`, whose backward pass begins each step anew from the state before it.

    Of L tokens in chunks of C, L / C states are kept and the temporaries of one chunk. The gradient
    of `shared`, which all steps see, is summed on the way; what of `moving` is boolean has none.
    """
    return jax.lax.scan(lambda state, xs: body(state, shared, xs), state, moving)


def _forward(body: Body, state: Any, shared: Any, moving: Any) -> tuple[Any, Any]:
    def step(state: Any, xs: Any) -> tuple[Any, Any]:
        after, y = body(state, shared, xs)
        return after, (state, y)

    last, (states, y) = jax.lax.scan(step, state, moving)
    return (last, y), (states, shared, moving)


def _backward(body: Body, kept: tuple, d_out: tuple[Any, Any]) -> tuple[Any, Any, Any]:
    states, shared, moving = kept

    def step(carry: tuple, xs: tuple) -> tuple[tuple, Any]:
        (d_state, d_shared), (state, moving, d_y) = carry, xs
        _, pull = jax.vjp(body, state, shared, moving)
        d_state, own, d_moving = pull((d_state, d_y))
        d_moving = jax.tree.map(lambda d: None if d.dtype == jax.dtypes.float0 else d, d_moving)
        return (d_state, jax.tree.map(jnp.add, d_shared, own)), d_moving

    d_last, d_y = d_out
    begun = d_last, jax.tree.map(jnp.zeros_like, shared)
    (d_state, d_shared), d_moving = jax.lax.scan(step, begun, (states, moving, d_y), reverse=True)
    return d_state, d_shared, d_moving


scan.defvjp(_forward, _backward)
