"""`h_t = a_t h_{t-1} + b_t`, elementwise: the recurrence of a vector."""

from functools import partial

import jax
import jax.numpy as jnp

from lcm.ops.recurrence import pallas
from lcm.ops.recurrence.pieces import chunk_of, chunked, joined
from lcm.types import Array

# Tokens at a time where none are given. A CPU is fastest without the extra work of scanning them
# together (tests/benchmarks/recurrence.py); elsewhere each step costs as much as many tokens.
ON_CPU, CHUNK = 1, 256


def op_diag(
    a: Array,
    b: Array,
    h0: Array | None = None,
    reset_BL: Array | None = None,
    *,
    chunk: int = 0,
) -> tuple[Array, Array]:
    """All states `h_t` and the last one, float32, of `a` and `b` `[B, L, ...]`.

    Complex `a` and `b` have states that are complex64.

    h0: the state before, `[B, ...]`, 0 by default.
    reset_BL: bool, where a document begins: there `h_t = b_t`.
    chunk: tokens that are scanned together, in a logarithm of their number of steps; chunks follow
        one another. 0 chooses by the device; on a TPU that is a kernel, of real numbers.

    The backward pass keeps `a` and what is given out.

    Raises:
        ValueError: for a negative chunk.
    """
    size = chunk_of(chunk, ON_CPU, CHUNK)
    kind = kind_of(a, b)
    in_kernel = chunk == 0 and pallas.diagonal_fits(a, b)
    if not in_kernel:  # which takes narrow ones as they are
        a, b = a.astype(kind), b.astype(kind)
    h0 = jnp.zeros(b[:, 0].shape, kind) if h0 is None else h0.astype(kind)
    if reset_BL is not None:
        a = jnp.where(reset_BL.reshape(*reset_BL.shape, *[1] * (a.ndim - 2)), 0, a)
    h = pallas.diagonal(a, b, h0) if in_kernel else _states(min(size, a.shape[1]), a, b, h0)
    return h, h[:, -1]


def kind_of(a: Array, b: Array) -> jnp.dtype:
    """The dtype of states: float32, or complex64 where something is complex."""
    return jnp.dtype(jnp.complex64 if jnp.iscomplexobj(a) or jnp.iscomplexobj(b) else jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _states(chunk: int, a: Array, b: Array, h0: Array) -> Array:
    return _scan(chunk, a, b, h0)


def _forward(chunk: int, a: Array, b: Array, h0: Array) -> tuple[Array, tuple]:
    h = _scan(chunk, a, b, h0)
    return h, (a, h0, h)


def _backward(chunk: int, kept: tuple, d_h: Array) -> tuple[Array, Array, Array]:
    """`g_t = dh_t + a_{t+1} g_{t+1}` is the same recurrence from the end, and `db_t = g_t`,
    `da_t = g_t h_{t-1}`, `dh_0 = a_1 g_1`; of complex numbers, too, whose cotangents JAX does
    not conjugate."""
    a, h0, h = kept
    next_a = jnp.concatenate([a[:, 1:], jnp.zeros_like(a[:, :1])], 1)
    g = _scan(chunk, next_a, d_h, jnp.zeros_like(h0), reverse=True)
    before = jnp.concatenate([h0[:, None], h[:, :-1]], 1)
    return g * before, g, a[:, 0] * g[:, 0]


_states.defvjp(_forward, _backward)


def _scan(chunk: int, a: Array, b: Array, h0: Array, reverse: bool = False) -> Array:
    length = a.shape[1]
    if length == 1:
        return a * h0[:, None] + b

    if chunk == 1:
        one = lambda h, ab: (ab[0] * h + ab[1],) * 2  # noqa: E731
        xs = a.swapaxes(0, 1), b.swapaxes(0, 1)
        return jax.lax.scan(one, h0, xs, reverse=reverse)[1].swapaxes(0, 1)

    def step(h: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        decay, own = jax.lax.associative_scan(_after, xs, axis=1, reverse=reverse)
        h = decay * h[:, None] + own
        return h[:, 0 if reverse else -1], h

    # What fills the last chunk is not seen: in reverse it comes first, and keeps the 0 that is h0.
    _, h = jax.lax.scan(step, h0, (chunked(a, chunk), chunked(b, chunk)), reverse=reverse)
    return joined(h, length)


def _after(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """One step after another is a step: `(a2 a1, a2 b1 + b2)`."""
    (a1, b1), (a2, b2) = first, second
    return a2 * a1, a2 * b1 + b2
