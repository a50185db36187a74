"""The recurrence of a matrix with one decay a head: a chunk's products, and their gradients.

Of a chunk that S enters, with G the inclusive sum of log-decays in it, e_i = exp(G_i), f_j =
exp(G_C - G_j), w = exp(G_C), D_ij = exp(G_i - G_j) and M_ij = (q_i k_j) D_ij for j <= i:

    y_i = e_i S^T q_i + sum_j M_ij v_j                    S' = w S + sum_j f_j k_j v_j^T

and with dM_ij = dy_i v_j,

    dv_j = sum_i M_ij dy_i + f_j dS'^T k_j                dS = w dS' + sum_i e_i q_i dy_i^T
    dq_i = sum_j dM_ij D_ij k_j + e_i S dy_i
    dk_j = sum_i dM_ij D_ij q_i + f_j dS' v_j
    dG_i = dy_i y_i - v_i dv_i, and of the last one <S', dS'> too

(SSD, arXiv:2405.21060). What a document's beginning cuts off is 0. Heads that share q and k lie
beside each other in the lanes of v, so that the products with S are of all of them at once.
Numbers of heads are to base 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lcm.ops.recurrence.pallas.plan import Ref
from lcm.ops.recurrence.pallas.products import dot, transposed, wide_dot
from lcm.types import Array

LOG2E = 1.4426950408889634


class Tile(NamedTuple):
    """A program's heads, their channels, and the tokens of a chunk."""

    heads: int
    width: int
    chunk: int

    def lanes(self, head: int) -> slice:
        return slice(head * self.width, (head + 1) * self.width)

    def wide(self, x_CR: Array) -> Array:
        """A number of each head for all of its channels, `[C, R P]`."""
        each = (len(x_CR), self.width)
        return jnp.concatenate(
            [jnp.broadcast_to(x_CR[:, r : r + 1], each) for r in range(self.heads)], 1
        )


class _Known(NamedTuple):
    """G of heads and the number of a token's document, as rows and as columns; e and f."""

    rows: Array
    columns: Array
    entry: Array  # [C, R P]
    after: Array  # [C, R P]


def forward(
    tile: Tile, known: Ref, q: Ref, k: Ref, v: Ref, S0: Ref, y: Ref, last: Ref, *refs: Ref
) -> None:
    """Outputs and the last state of a grid whose last axis is of chunks.

    refs: the state, and before it, where they are kept, those that enter chunks.
    """
    *kept, state = refs
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        state[...] = S0[...]

    for ref in kept:
        ref[...] = state[...]
    own, there = _known(tile, known), seen(tile.heads, known)
    scores = dot(q[...], k[...], (1, 1))
    S = state[...]
    found = [
        dot((scores * _decay(tile, own, there, r)).astype(v.dtype), v[:, tile.lanes(r)], (1, 0))
        for r in range(tile.heads)
    ]
    y[...] = (jnp.concatenate(found, 1) + own.entry * wide_dot(q[...], S, (1, 0))).astype(y.dtype)
    written = wide_dot(transposed(k[...]), own.after * v[...], (1, 0))
    state[...] = own.entry[-1:] * S + written

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        last[...] = state[...]


def backward(
    tile: Tile,
    known: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    states: Ref,
    d_y: Ref,
    d_last: Ref,
    d_q: Ref,
    d_k: Ref,
    d_v: Ref,
    d_known: Ref,
    d_S0: Ref,
    d_state: Ref,
) -> None:
    """Gradients, of a grid whose last axis is of chunks from the last one.

    All squares are transposed, `[j, i]`, as that of D M^T by dy then needs no transposing.
    """
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _():
        d_state[...] = d_last[...]

    own, there = _known(tile, known), seen(tile.heads, known, turned=True)
    scores, S, d_S = dot(k[...], q[...], (1, 1)), states[...], d_state[...]
    from_y, from_v = own.entry * d_y[...], own.after * v[...]
    through = d_y[...] * (own.entry * wide_dot(q[...], S, (1, 0)))
    d_entered = own.after * wide_dot(k[...], d_S, (1, 0))
    written = v[...] * d_entered
    # <S', dS'>: of what was written, and of what stayed.
    at_end = written.sum(0, keepdims=True) + own.entry[-1:] * (S * d_S).sum(0, keepdims=True)

    d_scores, d_columns = jnp.zeros_like(scores), jnp.zeros_like(own.columns)
    d_rows = jnp.zeros_like(own.rows)
    head_of_row, head_of_lane = (
        jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
        for x, axis in ((d_rows, 0), (d_columns, 1))
    )
    is_last = jax.lax.broadcasted_iota(jnp.int32, (tile.chunk, 1), 0) == tile.chunk - 1
    found = []
    for r in range(tile.heads):
        lanes = tile.lanes(r)
        decay, d_own = _decay(tile, own, there, r, turned=True), d_y[:, lanes]
        d_product = decay * dot(v[:, lanes], d_own, (1, 1))
        d_scores += d_product
        found.append(dot((scores * decay).astype(v.dtype), d_own, (1, 0)))
        d_span = d_product * scores
        column = (through[:, lanes] - written[:, lanes]).sum(1, keepdims=True)
        column -= d_span.sum(1, keepdims=True)
        column += jnp.where(is_last, at_end[:, lanes].sum(1, keepdims=True), 0)
        d_columns = jnp.where(head_of_lane == r, column, d_columns)
        d_rows = jnp.where(head_of_row == r, d_span.sum(0, keepdims=True), d_rows)

    d_v[...] = (jnp.concatenate(found, 1) + d_entered).astype(d_v.dtype)
    d_known[...] = d_rows + d_columns.T
    d_q[...] = (wide_dot(d_scores.T, k[...], (1, 0)) + wide_dot(from_y, S, (1, 1))).astype(
        d_q.dtype
    )
    d_k[...] = (wide_dot(d_scores, q[...], (1, 0)) + wide_dot(from_v, d_S, (1, 1))).astype(
        d_k.dtype
    )
    d_state[...] = own.entry[-1:] * d_S + wide_dot(transposed(q[...]), from_y, (1, 0))

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        d_S0[...] = d_state[...]


def _known(tile: Tile, known: Ref) -> _Known:
    rows = known[...]
    columns, at = rows.T, tile.heads
    document, last = columns[:, at : at + 1], columns[-1:]
    entry = jnp.exp2(jnp.where(document == 0, columns, -jnp.inf))
    after = jnp.exp2(jnp.where(document == last[:, at : at + 1], last - columns, -jnp.inf))
    return _Known(rows, columns, tile.wide(entry), tile.wide(after))


def seen(heads: int, known: Ref, turned: bool = False) -> Array:
    """Which tokens (lanes) a token (sublanes) sees, or is seen by if turned, `[C, C]`."""
    document = known[heads : heads + 1]
    square = document.shape[1], document.shape[1]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, square, axis) for axis in (0, 1))
    same = jnp.broadcast_to(document, square) == jnp.broadcast_to(document.T, square)
    return same & (row <= column if turned else row >= column)


def _decay(tile: Tile, own: _Known, there: Array, r: int, turned: bool = False) -> Array:
    """D, or its transpose."""
    span = own.columns[:, r : r + 1] - own.rows[r : r + 1]
    return jnp.exp2(jnp.where(there, -span if turned else span, -jnp.inf))
