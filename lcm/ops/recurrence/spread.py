"""Recurrences over a sequence that lies, in its order, on the mesh axis `context`.

A shard of the sequence maps the state before it to that after it, `S' = T S + S_0`, with S_0 the
state that it reaches from nothing. Each device finds its T and S_0, all get all of them, fold those
before their own, and add what the state that enters does to their outputs: one exchange, in place
of a wait for the shard before. T is a product of decays, or with `erase` the matrix that the
recurrence itself makes of the identity, with nothing written (as of chunks, arXiv:2406.06484).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lcm.ops.placed import CONTEXT, axes_in_use, axes_of_rows, shards
from lcm.ops.recurrence import convolution, diagonal, matrix, maxima
from lcm.ops.recurrence.reference import Erase, by_head
from lcm.types import Array


def _shards(length: int) -> int:
    """Over how many devices tokens lie, 1 where the axis does not divide them, as one token."""
    return shards() if length % shards() == 0 else 1


def op_diag(
    a: Array,
    b: Array,
    h0: Array | None = None,
    reset_BL: Array | None = None,
    *,
    chunk: int = 0,
) -> tuple[Array, Array]:
    run = functools.partial(diagonal.op_diag, chunk=chunk)
    count = _shards(b.shape[1])
    if count == 1:
        return run(a, b, h0, reset_BL)
    kind = diagonal.kind_of(a, b)
    h0 = jnp.zeros(b[:, 0].shape, kind) if h0 is None else h0.astype(kind)
    reset_BL = jnp.zeros(b.shape[:2], bool) if reset_BL is None else reset_BL

    def own(at: Array, moving: tuple, h0: Array) -> tuple[Array, Array]:
        a, b, reset_BL = moving
        h, last = run(a, b, None, reset_BL)
        # The same recurrence of 1 with nothing added: products of a, 0 after a reset.
        decay, whole = run(a, jnp.zeros_like(b), jnp.ones_like(h0), reset_BL)
        entered, last = _folded(lambda T, h: T * h, at, h0, whole, last)
        return h + decay * entered[:, None], last

    return _over(own, count, (a, b, reset_BL), h0)


def op_max(i: Array, f: Array, m0: Array, reset_BL: Array) -> tuple[Array, Array]:
    count = _shards(i.shape[1])
    if count == 1:
        return maxima.op_max(i, f, m0, reset_BL)

    def own(at: Array, moving: tuple, m0: Array) -> tuple[Array, Array]:
        moved, alone = maxima.from_nothing(*moving)
        ends = moved[:, -1], alone[:, -1]
        entered, last = _folded(jnp.add, at, m0, *ends, joined=jnp.maximum)
        return jnp.maximum(moved + entered[:, None], alone), last

    i, f, m0 = jax.lax.stop_gradient((i, f, m0))
    return _over(own, count, (i, f, reset_BL), m0)


def op_matrix(
    q_BLGN: Array,
    k_BLGN: Array,
    v_BLHP: Array,
    log_decay: Array,
    erase: Erase | None = None,
    S0_BHNP: Array | None = None,
    reset_BL: Array | None = None,
    *,
    chunk: int = 0,
) -> tuple[Array, Array]:
    run = functools.partial(matrix.op_matrix, chunk=chunk)
    count = _shards(v_BLHP.shape[1])
    if count == 1:
        return run(q_BLGN, k_BLGN, v_BLHP, log_decay, erase, S0_BHNP, reset_BL)
    matrix.check(q_BLGN, k_BLGN, v_BLHP, log_decay, erase, S0_BHNP)
    batch, length, heads, width = v_BLHP.shape
    states = q_BLGN.shape[-1]
    if S0_BHNP is None:
        S0_BHNP = jnp.zeros((batch, heads, states, width), jnp.float32)
    reset_BL = jnp.zeros((batch, length), bool) if reset_BL is None else reset_BL

    def own(at: Array, moving: tuple, S0: Array) -> tuple[Array, Array]:
        *token, reset_BL = moving
        shard = _erasing if erase else _decaying
        read, T, y, S = shard(run, *token, reset_BL)
        entered, last = _folded(_transition, at, S0, T, S)
        return (y.astype(jnp.float32) + read(entered)).astype(y.dtype), last

    moving = q_BLGN, k_BLGN, v_BLHP, log_decay, erase, reset_BL
    return _over(own, count, moving, S0_BHNP.astype(jnp.float32))


def short_conv(
    x_BLC: Array,
    w_WC: Array,
    bias_C: Array,
    tail_BWC: Array,
    reset_BL: Array,
    there_BL: Array,
) -> tuple[Array, Array]:
    count = _shards(x_BLC.shape[1])
    if count == 1:
        return convolution.short_conv(x_BLC, w_WC, bias_C, tail_BWC, reset_BL, there_BL)

    def own(at: Array, moving: tuple, tail: Array, w: Array, bias: Array) -> tuple[Array, Array]:
        x, reset, there = moving
        left = len(w) - 1
        # The tail of the shard alone: zeros where it has too few tokens, or begins a document.
        alone = convolution.tail(x, jnp.zeros_like(tail), reset, there)
        tokens = jnp.minimum(there.sum(1), left)
        entered, last = _folded(_tail_after, at, tail, (tokens, reset.any(1)), alone)
        y, _ = convolution.short_conv(x, w, bias, entered, reset, there)
        return y, last.astype(tail.dtype)

    return _over(own, count, (x_BLC, reset_BL, there_BL), tail_BWC, w_WC, bias_C)


def passed_on(
    run: Callable[[Any, Any, Array], tuple[Array, Array]],
    kept: Callable[[Any, Any], Array],
    moving: Any,
    fixed: Any,
    h0: Array,
) -> tuple[Array, Array]:
    """`run(moving, fixed, h0) -> (outputs, last state)` of another recurrence, shard by shard.

    moving: arrays `[B, L, ...]`; fixed: what all tokens share.
    kept: of the same two, what a state is multiplied by on its way through all of the tokens.

    Each device runs it twice, as nothing but the recurrence itself says how outputs see the state
    that enters: once from nothing, for the state at the end of its tokens.
    """
    count = _shards(jax.tree.leaves(moving)[0].shape[1])
    if count == 1:
        return run(moving, fixed, h0)

    def own(at: Array, moving: Any, h0: Array, fixed: Any) -> tuple[Array, Array]:
        _, last = run(moving, fixed, jnp.zeros_like(h0))
        entered, last = _folded(lambda T, h: T * h, at, h0, kept(moving, fixed), last)
        return run(moving, fixed, entered)[0], last

    return _over(own, count, moving, h0, fixed)


# Documented where they are defined.
op_diag.__doc__ = diagonal.op_diag.__doc__
op_max.__doc__ = maxima.op_max.__doc__
op_matrix.__doc__ = matrix.op_matrix.__doc__
short_conv.__doc__ = convolution.short_conv.__doc__


def _over(own: Callable, count: int, moving: Any, state: Array, *fixed: Any) -> Any:
    """`own(number of the shard, moving, state, *fixed) -> (outputs, last state)` on each device.

    Rows are cut over `data` and `fsdp`, of `moving` and of the state before: an exchange within
    axes that are XLA's would be of all rows. Other axes stay with it, which cuts channels as it
    does elsewhere. The number of a shard comes in an array, as XLA does not tell it where some axes
    are its own.
    """
    rows = axes_of_rows(axes_in_use(), len(state))
    tokens, own_rows = PartitionSpec(rows, CONTEXT), PartitionSpec(rows)
    return jax.shard_map(
        own,
        in_specs=(PartitionSpec(CONTEXT), tokens, own_rows, *[PartitionSpec()] * len(fixed)),
        out_specs=(tokens, own_rows),
        axis_names={CONTEXT, *(rows or ())},
        check_vma=False,  # the last state is the same on all, by the fold
    )(jnp.arange(count, dtype=jnp.int32), moving, state, *fixed)


def _folded(
    step: Callable[[Any, Array], Array],
    at: Array,
    first: Array,
    T: Any,
    S: Array,
    joined: Callable[[Array, Array], Array] = jnp.add,
) -> tuple[Array, Array]:
    """The state that enters the shard, and that after the last one; `S' = step(T, S) + S_0`, or
    what else joins the two."""
    every = jax.tree.map(lambda x: jax.lax.all_gather(x, CONTEXT), (T, S))

    def fold(carry: tuple, xs: tuple) -> tuple[tuple, None]:
        state, entered = carry
        number, (T, S) = xs
        entered = jnp.where(number == at[0], state, entered)
        return (joined(step(T, state), S), entered), None

    numbers = jnp.arange(every[1].shape[0], dtype=jnp.int32)
    (last, entered), _ = jax.lax.scan(fold, (first, jnp.zeros_like(first)), (numbers, every))
    return entered, last


def _decaying(
    run: Callable, q: Array, k: Array, v: Array, log_decay: Array, erase: None, reset_BL: Array
) -> tuple[Callable[[Array], Array], Array, Array, Array]:
    """Without `erase`: T is one number for each row of the state, or one for all of a head."""
    y, S = run(q, k, v, log_decay, None, None, reset_BL)
    heads, by_channel = v.shape[2], log_decay.ndim == 4
    total = jnp.cumsum(log_decay.astype(jnp.float32), 1)
    seen_BL = jnp.cumsum(reset_BL, 1) == 0  # masked before exp, as everywhere
    seen = seen_BL.reshape(*seen_BL.shape, *[1] * (total.ndim - 2))
    decay = jnp.exp(jnp.where(seen, total, -jnp.inf))
    T = decay[:, -1] if by_channel else decay[:, -1, :, None]

    def read(S_BHNP: Array) -> Array:
        if by_channel:
            wide = by_head(q, heads, 2).astype(jnp.float32) * decay
            return _dot("blhn,bhnp->blhp", wide, S_BHNP)
        split = S_BHNP.reshape(len(q), q.shape[2], -1, *S_BHNP.shape[2:])
        found = _dot("blgn,bgrnp->blgrp", q.astype(jnp.float32), split)
        return found.reshape(*found.shape[:2], heads, -1) * decay[..., None]

    return read, T, y, S


def _erasing(
    run: Callable, q: Array, k: Array, v: Array, log_decay: Array, erase: Erase, reset_BL: Array
) -> tuple[Callable[[Array], Array], Array, Array, Array]:
    """With `erase`: columns of the identity run beside those of values.

    What they read, `R_t = T_t^T q_t`, is how outputs see the state that enters.
    """
    (batch, length, heads, width), states = v.shape, q.shape[-1]
    nothing = jnp.zeros((batch, length, heads, states), v.dtype)
    eye = jnp.broadcast_to(jnp.eye(states), (batch, heads, states, states))
    S0 = jnp.concatenate([jnp.zeros((batch, heads, states, width)), eye], -1)
    y, S = run(q, k, jnp.concatenate([v, nothing], -1), log_decay, erase, S0, reset_BL)
    seen = y[..., width:].astype(jnp.float32)
    read = lambda S_BHNP: _dot("blhn,bhnp->blhp", seen, S_BHNP)  # noqa: E731
    return read, S[..., width:], y[..., :width], S[..., :width]


def _transition(T: Array, S_BHNP: Array) -> Array:
    return T[..., None] * S_BHNP if T.ndim == 3 else _dot("bhnm,bhmp->bhnp", T, S_BHNP)


def _tail_after(shard: tuple[Array, Array], tail_BWC: Array) -> Array:
    """What stays of the tail behind a shard of so many tokens, where none begins a document."""
    tokens_B, begins_B = shard
    left = tail_BWC.shape[1]
    at = jnp.arange(left)[None] + tokens_B[:, None]
    moved = jnp.take_along_axis(tail_BWC, jnp.minimum(at, left - 1)[..., None], 1)
    stays = (at < left) & ~begins_B[:, None]
    return jnp.where(stays[..., None], moved, 0)


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST)
