"""The recurrence of a matrix that erases, with one decay a head: a chunk's products and gradients.

Of a chunk that S enters, with G the inclusive sum of log-decays in it, e_i = exp(G_i), x_i =
exp(G_{i-1}), f_j = exp(G_C - G_j), w = exp(G_C), r_j the rate of erasure, D_ij = exp(G_i - G_j) for
j <= i and D'_ij = exp(G_{i-1} - G_j) for j < i, squares are A_qy = q y^T D and A_ay = a y^T D', and

    T = (I - A_ab r)^-1     U = T (x a S + A_ak V)     W = r U
    Y = e q S + A_qk V + A_qb W                        S' = w S + k^T f V + b^T f W

(`lcm.ops.recurrence.matrix`; the form of arXiv:2412.06464). With B_qy = D (dY z^T) and B_ay = D'
(dF z^T), z being V for y = k and U for y = b,

    dW = A_qb^T dY + f b dS'    dF = T^T r dW    dV = A_qk^T dY + A_ak^T dF + f k dS'
    dq = B_qk k + B_qb r b + e dY S^T            dk = B_qk^T q + B_ak^T a + f V dS'^T
    da = B_ak k + B_ab r b + x dF S^T            db = r (B_qb^T q + B_ab^T a + f U dS'^T)
    dS = w dS' + q^T e dY + a^T x dF             dr_j = b_j db_j / r_j
    dG_i = q_i dq_i + a_{i+1} da_{i+1} - k_i dk_i - b_i db_i, and of the last one <S', dS'> too

as Y is linear in q and e, F in a and x. Products q dq and so on are sums of B A, so that what
cancels in them is the same. Numbers of heads are to base 2. What a document's beginning cuts off
is 0.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lcm.ops.recurrence.pallas.matrix_kernels import seen
from lcm.ops.recurrence.pallas.plan import Ref
from lcm.ops.recurrence.pallas.products import dot, wide_dot
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

    @property
    def rates(self) -> slice:
        """The rows of rates in what is known: behind G of heads and documents."""
        return slice(self.heads + 1, 2 * self.heads + 1)


class Tokens(NamedTuple):
    """q, k, a, b `[..., . N]`, which heads may share in groups, and v `[..., M P]`."""

    q: Any
    k: Any
    a: Any
    b: Any
    v: Any


class _Head(NamedTuple):
    """A head's tokens, and its decays and squares."""

    q: Array
    k: Array
    a: Array
    b: Array
    v: Array
    entry: Array  # e, [C, 1]
    before: Array  # x, [C, 1]
    after: Array  # f, [C, 1]
    rate: Array  # r, [C, 1]
    rate_row: Array  # [1, C]
    D: Array  # [C, C]
    D_before: Array  # D'
    qk: Array  # A
    qb: Array
    ak: Array
    ab: Array


def forward(tile: Tile, known: Ref, *refs: Ref) -> None:
    """Outputs and the last state of a grid whose last axis is of chunks.

    refs: those of `Tokens`, the state before; outputs and the last state; where they are kept the
    states that enter chunks; the state.
    """
    tokens, (S0, y, last, *kept, state) = Tokens(*refs[:5]), refs[5:]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        state[...] = S0[...]

    for ref in kept:
        ref[...] = state[...]
    heads = _heads(tile, known, tokens)
    outputs = []
    for r, (head, (_, U)) in enumerate(zip(heads, _erased(heads, state), strict=True)):
        S, W, narrow = state[r], head.rate * U, head.v.dtype
        within = dot(head.qk.astype(narrow), head.v, (1, 0))
        within += dot(head.qb.astype(narrow), W.astype(narrow), (1, 0))
        outputs.append(within + head.entry * wide_dot(head.q, S, (1, 0)))
        written = wide_dot(head.k, head.after * head.v, (0, 0))
        written += wide_dot(head.b, head.after * W, (0, 0))
        state[r] = head.entry[-1:] * S + written
    y[...] = jnp.concatenate(outputs, 1).astype(y.dtype)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        last[...] = state[...]


def backward(tile: Tile, known: Ref, *refs: Ref) -> None:
    """Gradients, of a grid whose last axis is of chunks from the last one.

    refs: those of `Tokens`, the states that enter chunks, gradients of outputs and the last state;
    those of `Tokens`, of G and rates, and of the state before; the state's.
    """
    tokens, (states, d_y, d_last) = Tokens(*refs[:5]), refs[5:8]
    *d_tokens, d_known, d_S0, d_state = refs[8:]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        d_state[...] = d_last[...]

    heads = _heads(tile, known, tokens)
    parts = [
        _gradients(head, T, U, states[r], tile.own(d_y, r), d_state[r])
        for r, (head, (T, U)) in enumerate(zip(heads, _erased(heads, states), strict=True))
    ]
    for r, part in enumerate(parts):
        d_state[r] = part.S
    for at, ref in enumerate(d_tokens):
        add(ref, [part.tokens[at] for part in parts])
    d_known[: tile.heads] = jnp.concatenate([part.G for part in parts])
    d_known[tile.rates] = jnp.concatenate([part.rate for part in parts])

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        d_S0[...] = d_state[...]


class _Gradients(NamedTuple):
    """Of a head: q, k, a, b and v; G and rate, `[1, C]`; the state."""

    tokens: Tokens
    G: Array
    rate: Array
    S: Array


def _gradients(head: _Head, T: Array, U: Array, S: Array, d_y: Array, d_S: Array) -> _Gradients:
    q, k, a, b, v = head[:5]
    narrow = lambda x: x.astype(v.dtype)  # noqa: E731
    d_W = dot(narrow(head.qb), d_y, (0, 0)) + head.after * wide_dot(b, d_S, (1, 0))
    d_F = dot(T, head.rate * d_W, (0, 0))
    d_v = dot(narrow(head.qk), d_y, (0, 0)) + head.after * wide_dot(k, d_S, (1, 0))
    d_v += dot(narrow(head.ak), narrow(d_F), (0, 0))

    d_qk, d_qb = (dot(d_y, narrow(z), (1, 1)) for z in (v, U))
    d_ak, d_ab = (dot(narrow(d_F), narrow(z), (1, 1)) for z in (v, U))
    qk, qb, ak, ab = (
        narrow(x)
        for x in (head.D * d_qk, head.D * d_qb, head.D_before * d_ak, head.D_before * d_ab)
    )
    from_q = head.entry * wide_dot(d_y, S, (1, 1))
    from_a = head.before * wide_dot(narrow(d_F), S, (1, 1))
    from_k, from_b = (head.after * wide_dot(narrow(z), d_S, (1, 1)) for z in (v, U))
    erased = narrow(head.rate * b)
    d_q = from_q + _pair(qk, narrow(k), qb, erased)
    d_a = from_a + _pair(ak, narrow(k), ab, erased)
    d_k = from_k + _pair(qk, narrow(q), ak, narrow(a), 0)
    d_b = head.rate * (from_b + _pair(qb, narrow(q), ab, narrow(a), 0))
    d_before = wide_dot(q, head.entry * d_y, (0, 0))
    d_before += wide_dot(a, head.before * d_F, (0, 0))

    squares = d_qk * head.qk, d_qb * head.qb, d_ak * head.ak, d_ab * head.ab
    sides = q * from_q, k * from_k, a * from_a, b * from_b
    d_G, d_rate = _of_sums(head, squares, sides, (S * d_S).sum(keepdims=True))
    own = Tokens(d_q, d_k, d_a, d_b, d_v)
    return _Gradients(own, d_G, d_rate, head.entry[-1:] * d_S + d_before)


def _of_sums(
    head: _Head, squares: Sequence[Array], sides: Sequence[Array], kept: Array
) -> tuple[Array, Array]:
    """The gradients of G and of the rate, `[1, C]`.

    squares: B A, what a token gets (rows) from another; sides: q, k, a and b times what each of
    their gradients has from a state; kept: <S, dS'>.
    """
    qk, qb, ak, ab = squares
    q, k, a, b = (x.sum(1, keepdims=True) for x in sides)
    q += (qk + head.rate_row * qb).sum(1, keepdims=True)
    a += (ak + head.rate_row * ab).sum(1, keepdims=True)
    written = k + head.rate * b
    at_end = written.sum(0, keepdims=True) + head.entry[-1:] * kept
    row = jax.lax.broadcasted_iota(jnp.int32, written.shape, 0)
    column = q - written + jnp.where(row == len(row) - 1, at_end, jnp.roll(a, -1, 0))
    d_rate = (qb + ab).sum(0, keepdims=True)
    d_G = column.T - (qk + ak).sum(0, keepdims=True) - head.rate_row * d_rate
    return d_G, d_rate + b.T


def _pair(first: Array, x: Array, second: Array, y: Array, axis: int = 1) -> Array:
    return dot(first, x, (axis, 0)) + dot(second, y, (axis, 0))


def add(ref: Ref, parts: list[Array]) -> None:
    """Writes a block of gradients, of what heads share the sum."""
    each = len(parts) * parts[0].shape[1] // ref.shape[1]
    sums = [sum(parts[at : at + each]) for at in range(0, len(parts), each)]
    ref[...] = jnp.concatenate(sums, 1).astype(ref.dtype)


def _erased(heads: list[_Head], states: Ref) -> list[tuple[Array, Array]]:
    """T and U of all heads."""
    T = inverses([head.rate_row * head.ab for head in heads])
    found = [
        h.before * wide_dot(h.a, states[r], (1, 0)) + wide_dot(h.ak, h.v, (1, 0))
        for r, h in enumerate(heads)
    ]
    return [(x, dot(x, y, (1, 0))) for x, y in zip(T, found, strict=True)]


def _heads(tile: Tile, known: Ref, tokens: Tokens) -> list[_Head]:
    """Tokens, decays and squares of a block's heads, from what is known of them, `[rows, C]`."""
    rows = known[...]
    columns, at = rows.T, tile.heads
    document, last, there = columns[:, at : at + 1], columns[-1:], seen(at, known)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, there.shape, axis) for axis in (0, 1))
    begun = jnp.where(row[:, :1] == 0, 0.0, jnp.roll(columns, 1, 0))
    products = {}

    def decay(where: Array, span: Array) -> Array:
        return jnp.exp2(jnp.where(where, span, -jnp.inf))

    def product(x: str, y: str, r: int) -> Array:
        """Of what several heads share, one."""
        x, y = getattr(tokens, x), getattr(tokens, y)
        key = id(x), tile.place(x, r), id(y), tile.place(y, r)
        if key not in products:
            products[key] = dot(tile.shared(x, r), tile.shared(y, r), (1, 1))
        return products[key]

    def head(r: int) -> _Head:
        G, G_before, G_row = columns[:, r : r + 1], begun[:, r : r + 1], rows[r : r + 1]
        D = decay(there, G - G_row)
        D_before = decay(there & (row != column), G_before - G_row)
        rate = at + 1 + r
        return _Head(
            *(tile.shared(x, r) for x in tokens[:4]),
            tile.own(tokens.v, r),
            entry=decay(document == 0, G),
            before=decay(document == 0, G_before),
            after=decay(document == last[:, at : at + 1], last[:, r : r + 1] - G),
            rate=columns[:, rate : rate + 1],
            rate_row=rows[rate : rate + 1],
            D=D,
            D_before=D_before,
            qk=product("q", "k", r) * D,
            qb=product("q", "b", r) * D,
            ak=product("a", "k", r) * D_before,
            ab=product("a", "b", r) * D_before,
        )

    return [head(r) for r in range(tile.heads)]
