"""The recurrence of a matrix that erases, with one decay a head: a chunk's products and gradients.

Of a chunk that S enters, with G the inclusive sum of log-decays in it, e_i = exp(G_i), x_i =
exp(G_{i-1}), f_j = exp(G_C - G_j), w = exp(G_C), and squares A_qy[i, j] = (q_i y_j) exp(G_i - G_j)
for j <= i and A_ay[i, j] = (a_i y_j) exp(G_{i-1} - G_j) for j < i:

    T = (I - A_ab)^-1       F = x a S + A_ak V       U = T F
    Y = e q S + A_qk V + A_qb U                      S' = w S + k^T f V + b^T f U

(`lcm.ops.recurrence.matrix`; the form of arXiv:2412.06464). With B_qy[i, j] = (dY_i y_j) exp(G_i -
G_j) and B_ay[i, j] = (dF_i y_j) exp(G_{i-1} - G_j), y being v for k and U for b,

    dU = A_qb^T dY + f b dS'    dF = T^T dU    dV = A_qk^T dY + A_ak^T dF + f k dS'
    dq = B_qk k + B_qb b + e dY S^T            dk = B_qk^T q + B_ak^T a + f V dS'^T
    da = B_ak k + B_ab b + x dF S^T            db = B_qb^T q + B_ab^T a + f U dS'^T
    dS = w dS' + q^T e dY + a^T x dF
    dG_i = q_i dq_i + a_{i+1} da_{i+1} - k_i dk_i - b_i db_i, and of the last one <S', dS'> too

as Y is linear in q and exp(G), F in a and exp(G). Numbers of heads are to base 2. What a document's
beginning cuts off is 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lcm.ops.recurrence.pallas.plan import Ref
from lcm.ops.recurrence.pallas.products import dot, transposed, wide_dot
from lcm.ops.recurrence.pallas.triangles import inverses
from lcm.types import Array


class Tile(NamedTuple):
    """A program's heads, their rows and channels, and the tokens of a chunk."""

    heads: int
    states: int
    width: int
    chunk: int

    def place(self, x: Ref, head: int) -> int:
        """Which of a block's q, k, a or b, that heads may share, is that of a head."""
        return head * x.shape[1] // (self.heads * self.states)

    def shared(self, x: Ref, head: int) -> Array:
        """That of a head, `[C, N]`."""
        start = self.place(x, head) * self.states
        return x[:, start : start + self.states]

    def own(self, x: Ref, head: int) -> Array:
        """The channels of a head, `[C, P]`."""
        return x[:, head * self.width : (head + 1) * self.width]


class Given(NamedTuple):
    """What a program is given of heads: q, k, a, b `[C, . N]`, v `[C, M P]`."""

    q: Ref
    k: Ref
    a: Ref
    b: Ref
    v: Ref


class _Head(NamedTuple):
    """A head's tokens, and its decays: from the beginning, to the end, between two tokens."""

    q: Array
    k: Array
    a: Array
    b: Array
    v: Array
    entry: Array  # e, [C, 1]
    before: Array  # x, [C, 1]
    after: Array  # f, [C, 1]
    between: Array  # of A_q, [C, C]
    between_before: Array  # of A_a, [C, C]


class _Squares(NamedTuple):
    """A of a head, but A_ab."""

    ak: Array
    qk: Array
    qb: Array


def forward(tile: Tile, known: Ref, *refs: Ref) -> None:
    """Outputs and the last state of a grid whose last axis is of chunks.

    refs: those of `Given`, the state before; outputs and the last state; where they are kept the
    states that enter chunks; the state.
    """
    given, (S0, y, last, *kept, state) = Given(*refs[:5]), refs[5:]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        state[...] = S0[...]

    for ref in kept:
        ref[...] = state[...]
    heads = _heads(tile, known, given)
    squares, found = _found(heads, [state[r] for r in range(tile.heads)])
    outputs = []
    for r, (head, A, (_, U)) in enumerate(zip(heads, squares, found, strict=True)):
        S, narrow = state[r], head.v.dtype
        within = dot(A.qk.astype(narrow), head.v, (1, 0))
        within += dot(A.qb.astype(narrow), U.astype(narrow), (1, 0))
        outputs.append(within + head.entry * wide_dot(head.q, S, (1, 0)))
        written = wide_dot(transposed(head.k), head.after * head.v, (1, 0))
        written += wide_dot(transposed(head.b), head.after * U, (1, 0))
        state[r] = head.entry[-1:] * S + written
    y[...] = jnp.concatenate(outputs, 1).astype(y.dtype)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        last[...] = state[...]


def _found(
    heads: list[_Head], states: list[Array]
) -> tuple[list[_Squares], list[tuple[Array, Array]]]:
    """Squares, and T and U, of all heads."""
    T = inverses([dot(h.a, h.b, (1, 1)) * h.between_before for h in heads])
    squares = [
        _Squares(
            dot(h.a, h.k, (1, 1)) * h.between_before,
            dot(h.q, h.k, (1, 1)) * h.between,
            dot(h.q, h.b, (1, 1)) * h.between,
        )
        for h in heads
    ]
    F = [
        h.before * wide_dot(h.a, S, (1, 0)) + wide_dot(A.ak, h.v, (1, 0))
        for h, A, S in zip(heads, squares, states, strict=True)
    ]
    return squares, [(x, dot(x, y, (1, 0))) for x, y in zip(T, F, strict=True)]


def backward(tile: Tile, known: Ref, *refs: Ref) -> None:
    """Gradients, of a grid whose last axis is of chunks from the last one.

    refs: those of `Given`, the states that enter chunks, gradients of outputs and the last state;
    those of `Given`, of G and of the state before; the state's.
    """
    given, (states, d_y, d_last) = Given(*refs[:5]), refs[5:8]
    *d_given, d_known, d_S0, d_state = refs[8:]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        d_state[...] = d_last[...]

    heads = _heads(tile, known, given)
    squares, inner = _found(heads, [states[r] for r in range(tile.heads)])
    parts = [
        _gradients(head, A, T, U, states[r], tile.own(d_y, r), d_state[r])
        for r, (head, A, (T, U)) in enumerate(zip(heads, squares, inner, strict=True))
    ]
    for r, part in enumerate(parts):
        d_state[r] = part.S
    for at, ref in enumerate(d_given):
        _add(tile, ref, [part.given[at] for part in parts])
    d_rows = jnp.concatenate([part.G for part in parts], 1).T
    d_known[...] = jnp.zeros_like(d_known)
    d_known[: tile.heads] = d_rows

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        d_S0[...] = d_state[...]


class _Gradients(NamedTuple):
    """Of a head: q, k, a, b and v, G `[C, 1]` and the state."""

    given: Given
    G: Array
    S: Array


def _gradients(
    head: _Head, A: _Squares, T: Array, U: Array, S: Array, d_y: Array, d_S: Array
) -> _Gradients:
    q, k, a, b, v, entry, before, after, between, between_before = head
    narrow = lambda x: x.astype(v.dtype)  # noqa: E731
    d_U = dot(narrow(A.qb.T), d_y, (1, 0)) + after * wide_dot(b, d_S, (1, 0))
    d_F = dot(T.T, d_U, (1, 0))
    d_v = dot(narrow(A.qk.T), d_y, (1, 0)) + after * wide_dot(k, d_S, (1, 0))
    d_v += dot(narrow(A.ak.T), narrow(d_F), (1, 0))

    qk, qb = (between * dot(d_y, narrow(x), (1, 1)) for x in (v, U))
    ak, ab = (between_before * dot(narrow(d_F), narrow(x), (1, 1)) for x in (v, U))
    d_q = _pair(qk, k, qb, b) + entry * wide_dot(d_y, S, (1, 1))
    d_a = _pair(ak, k, ab, b) + before * wide_dot(d_F, S, (1, 1))
    k_written, b_written = (after * wide_dot(x, d_S, (1, 1)) for x in (v, U))
    d_k = _pair(qk.T, q, ak.T, a) + k_written
    d_b = _pair(qb.T, q, ab.T, a) + b_written
    d_before = wide_dot(transposed(q), entry * d_y, (1, 0))
    d_before += wide_dot(transposed(a), before * d_F, (1, 0))
    w = entry[-1:]

    row = jax.lax.broadcasted_iota(jnp.int32, entry.shape, 0)
    is_last = row == len(row) - 1
    at_end = (k * k_written + b * b_written).sum() + (w * S * d_S).sum()
    column = (q * d_q - k * d_k - b * d_b).sum(1, keepdims=True)
    column += jnp.where(is_last, at_end, jnp.roll((a * d_a).sum(1, keepdims=True), -1, 0))
    return _Gradients(Given(d_q, d_k, d_a, d_b, d_v), column, w * d_S + d_before)


def _pair(first: Array, x: Array, second: Array, y: Array) -> Array:
    return wide_dot(first, x, (1, 0)) + wide_dot(second, y, (1, 0))


def _add(tile: Tile, ref: Ref, parts: list[Array]) -> None:
    """Writes a block of gradients, of what heads share the sum."""
    width = parts[0].shape[1]
    each = len(parts) * width // ref.shape[1]
    sums = [sum(parts[at : at + each]) for at in range(0, len(parts), each)]
    ref[...] = jnp.concatenate(sums, 1).astype(ref.dtype)


def _heads(tile: Tile, known: Ref, given: Given) -> list[_Head]:
    """Tokens and decays of all heads of a block, from their G and documents, `[rows, C]`."""
    rows = known[...]
    columns, at = rows.T, tile.heads
    document, last = columns[:, at : at + 1], columns[-1:]
    row, column = (
        jax.lax.broadcasted_iota(jnp.int32, (tile.chunk, tile.chunk), axis) for axis in (0, 1)
    )
    same = jnp.broadcast_to(document, row.shape) == jnp.broadcast_to(rows[at : at + 1], row.shape)
    begun = jnp.where(row[:, :1] == 0, 0.0, jnp.roll(columns, 1, 0))

    def decay(there: Array, span: Array) -> Array:
        return jnp.exp2(jnp.where(there, span, -jnp.inf))

    found = []
    for r in range(tile.heads):
        G, G_before, G_row = columns[:, r : r + 1], begun[:, r : r + 1], rows[r : r + 1]
        shared = (tile.shared(x, r) for x in given[:4])
        head = _Head(
            *shared,
            tile.own(given.v, r),
            entry=decay(document == 0, G),
            before=decay(document == 0, G_before),
            after=decay(document == last[:, at : at + 1], last[:, r : r + 1] - G),
            between=decay(same & (row >= column), G - G_row),
            between_before=decay(same & (row > column), G_before - G_row),
        )
        found.append(head)
    return found
