"""The recurrence of a matrix with a decay for each channel: a chunk's products and gradients.

Of a chunk that S enters, with G the inclusive sum of log-decays in it, e_i = exp(G_i), x_i =
exp(G_{i-1}), f_j = exp(G_C - G_j), w = exp(G_C), and squares A of `halves`, strict those of a,

    U = (I - A_ab)^-1 ((x a) S + A_ak V)           Y  = (e q) S + A_qk V + A_qb U
                                                   S' = w S + (f k)^T V + (f b)^T U

(`lcm.ops.recurrence.matrix`); without a and b there is no U. Where B_qy = dY Z^T and B_ay = dF Z^T
are the gradients of squares, Z being V for y = k and U for y = b,

    dU = A_qb^T dY + (f b) dS'    dF = (I - A_ab)^-T dU    dV = A_qk^T dY + A_ak^T dF + (f k) dS'
    dq, dk = of B_qk, B_ak, B_qb  + e (dY S^T), f (V dS'^T)
    da, db = of B_ak, B_ab, B_qb  + x (dF S^T), f (U dS'^T)
    dS = w dS' + (e q)^T dY + (x a)^T dF
    dG_i = q_i dq_i + a_{i+1} da_{i+1} - k_i dk_i - b_i db_i, and of the last one <S', dS'> too,

products by channel. States are transposed, `[P, N]`, so that channels that decay lie in lanes. k
and b are the columns of one array of 2 C, and V and U its values, as q and a both meet both. What a
document's beginning cuts off is 0.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from lcm.ops.recurrence.pallas.erasing_kernels import Tile, add
from lcm.ops.recurrence.pallas.halves import Pairs, Spans, gradients, products, spans_of
from lcm.ops.recurrence.pallas.matrix_kernels import LOG2E, seen
from lcm.ops.recurrence.pallas.plan import Ref
from lcm.ops.recurrence.pallas.products import dot, wide_dot
from lcm.ops.recurrence.pallas.triangles import inverses
from lcm.types import Array


class Tokens(NamedTuple):
    """Log-decays `[..., H N]`, v `[..., H P]`, and q, k, of what erases a and b too, which heads
    may share in groups, `[..., . N]`."""

    l: Any
    v: Any
    q: Any
    k: Any
    a: Any = None
    b: Any = None


class _Head(NamedTuple):
    """A head's tokens and decays."""

    v: Array
    q: Array
    a: Array | None
    columns: Array  # k, and b, [M C, N]
    halves: list[Spans]
    entry: Array  # e, [C, N]
    before: Array  # x
    after: Array  # f
    seen: Array  # which tokens (lanes) a token sees, [C, M C]
    seen_before: Array  # without itself

    @property
    def of_q(self) -> Pairs:
        """Multiplied as narrow as values are."""
        return Pairs(self.q, self.columns, False, self.v.dtype)

    def of_a(self, dtype: DTypeLike) -> Pairs:
        return Pairs(self.a, self.columns, True, dtype)

    def written(self, at: int) -> Array:
        """f k, or f b."""
        size = len(self.v)
        return self.after * self.columns[at * size : (at + 1) * size]

    def square(self, pairs: Pairs) -> Array:
        """A, `[C, M C]`."""
        A = products(pairs, self.halves)
        return jnp.where(self.seen_before if pairs.strict else self.seen, A, 0)


class _Written(NamedTuple):
    """What a head writes: V, and of one that erases U, with A_ak and A_ab and the inverse."""

    values: list[Array]
    strict: Array | None = None
    T: Array | None = None


def forward(count: int, tile: Tile, document: Ref, *refs: Ref) -> None:
    """Outputs and the last state of a grid whose last axis is of chunks.

    count: of the arrays of `Tokens`. refs: those, the state before; outputs and the last state;
    where they are kept the states that enter chunks; the state.
    """
    tokens, (S0, y, last, *kept, state) = Tokens(*refs[:count]), refs[count:]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        for r in range(tile.heads):
            state[r] = S0[r].T

    for ref in kept:
        ref[...] = state[...]
    heads = _heads(tile, document, tokens)
    outputs = []
    for r, (head, own) in enumerate(zip(heads, _written(heads, state), strict=True)):
        S, narrow = state[r], head.v.dtype
        values = jnp.concatenate(own.values).astype(narrow)
        within = dot(head.square(head.of_q).astype(narrow), values, (1, 0))
        outputs.append(within + wide_dot((head.entry * head.q).astype(narrow), S, (1, 1)))
        written = [wide_dot(z, head.written(at), (0, 0)) for at, z in enumerate(own.values)]
        state[r] = head.entry[-1:] * S + sum(written)
    y[...] = jnp.concatenate(outputs, 1).astype(y.dtype)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for r in range(tile.heads):
            last[r] = state[r].T


def backward(count: int, tile: Tile, document: Ref, *refs: Ref) -> None:
    """Gradients, of a grid whose last axis is of chunks from the last one.

    count: of the arrays of `Tokens`. refs: those, the states that enter chunks, gradients of
    outputs and the last state; those of `Tokens` and of the state before; the state's.
    """
    tokens, (states, d_y, d_last) = Tokens(*refs[:count]), refs[count : count + 3]
    *d_tokens, d_S0, d_state = refs[count + 3 :]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        for r in range(tile.heads):
            d_state[r] = d_last[r].T

    heads = _heads(tile, document, tokens)
    parts = [
        _gradients(head, own, states[r], tile.own(d_y, r), d_state[r])
        for r, (head, own) in enumerate(zip(heads, _written(heads, states), strict=True))
    ]
    for r, (_, d_S) in enumerate(parts):
        d_state[r] = d_S
    for at, ref in enumerate(d_tokens):
        add(ref, [own[at] for own, _ in parts])

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for r in range(tile.heads):
            d_S0[r] = d_state[r].T


def _gradients(
    head: _Head, own: _Written, S: Array, d_y: Array, d_S: Array
) -> tuple[Tokens, Array]:
    """Of a head's tokens, and of the state that enters."""
    size, dtype = len(head.v), head.v.dtype
    narrow = lambda x: x.astype(dtype)  # noqa: E731
    values = narrow(jnp.concatenate(own.values))
    d_values = dot(narrow(head.square(head.of_q)), d_y, (0, 0))
    d_v = d_values[:size] + wide_dot(narrow(head.written(0)), d_S, (1, 1))
    within = gradients(head.of_q, head.halves, jnp.where(head.seen, dot(d_y, values, (1, 1)), 0))
    d_q, of_q, d_columns, of_columns = within.x, within.of_x, within.y, within.of_y

    read = head.entry * wide_dot(d_y, S, (1, 0))
    after = jnp.concatenate([head.after] * len(own.values))
    at_end = after * wide_dot(values, d_S, (1, 0))
    d_before = head.entry[-1:] * d_S + wide_dot(d_y, head.entry * head.q, (0, 0))
    d_a, of_a = None, jnp.zeros_like(of_q)
    if head.a is not None:
        d_U = d_values[size:] + dot(head.written(1), d_S, (1, 1))
        d_F = dot(own.T, d_U, (0, 0))
        d_v += dot(narrow(own.strict[:, :size]), narrow(d_F), (0, 0))
        d_strict = jnp.where(head.seen_before, dot(narrow(d_F), values, (1, 1)), 0)
        within = gradients(head.of_a(dtype), head.halves, d_strict)
        found = head.before * wide_dot(narrow(d_F), S, (1, 0))
        d_a, of_a = within.x + found, within.of_x + head.a * found
        d_columns, of_columns = d_columns + within.y, of_columns + within.of_y
        d_before += dot(d_F, head.before * head.a, (0, 0))

    to_end = head.columns * at_end
    last = to_end.sum(0, keepdims=True) + head.entry[-1:] * (S * d_S).sum(0, keepdims=True)
    d_l = _of_log_decay(of_q + head.q * read, of_a, of_columns + to_end, last)
    d_columns += at_end
    d_k, d_b = d_columns[:size], d_columns[size:] if head.a is not None else None
    return Tokens(d_l, d_v, d_q + read, d_k, d_a, d_b), d_before


def _of_log_decay(q: Array, a: Array, columns: Array, last: Array) -> Array:
    """The gradient of log-decays, `[C, N]`.

    q, a, columns: each of these times its gradient; last: what the sum over the chunk has too,
    `[1, N]`.
    """
    size = len(q)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    d_G = q - sum(columns[at : at + size] for at in range(0, len(columns), size))
    d_G += jnp.where(row[:, :1] == size - 1, last, jnp.roll(a, -1, 0))
    return wide_dot((row <= column).astype(jnp.bfloat16), d_G, (1, 0))


def _heads(tile: Tile, document: Ref, tokens: Tokens) -> list[_Head]:
    """Tokens and decays of a block's heads; document: the number of each token's, `[1, C]`."""
    number, there = document[...].T, seen(0, document)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, there.shape, axis) for axis in (0, 1))
    count = 1 if tokens.a is None else 2
    # Registers of booleans cannot be moved in lanes.
    there, before = (
        jnp.concatenate([jnp.where(x, 1.0, 0.0)] * count, 1) > 0
        for x in (there, there & (row != column))
    )

    def wide(x: Ref, r: int) -> Array:
        return tile.shared(x, r).astype(jnp.float32)

    def head(r: int) -> _Head:
        halves, whole = spans_of(tile.shared(tokens.l, r) * LOG2E)
        columns = [wide(y, r) for y in (tokens.k, tokens.b) if y is not None]
        return _Head(
            tile.own(tokens.v, r),
            wide(tokens.q, r),
            None if tokens.a is None else wide(tokens.a, r),
            jnp.concatenate(columns),
            halves,
            entry=jnp.where(number == 0, jnp.exp2(whole.through), 0),
            before=jnp.where(number == 0, jnp.exp2(whole.before), 0),
            after=jnp.where(number == number[-1:], jnp.exp2(whole.after), 0),
            seen=there,
            seen_before=before,
        )

    return [head(r) for r in range(tile.heads)]


def _written(heads: list[_Head], states: Ref) -> list[_Written]:
    """Of each head; states: those that enter."""
    if heads[0].a is None:
        return [_Written([head.v]) for head in heads]
    size = len(heads[0].v)
    strict = [head.square(head.of_a(jnp.float32)) for head in heads]
    inverted = inverses([A[:, size:] for A in strict])
    found = []
    for r, (head, A, T) in enumerate(zip(heads, strict, inverted, strict=True)):
        F = dot(head.before * head.a, states[r], (1, 1)) + wide_dot(A[:, :size], head.v, (1, 0))
        found.append(_Written([head.v, dot(T, F, (1, 0))], A, T))
    return found
