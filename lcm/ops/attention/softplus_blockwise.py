"""Softplus attention with re-weighting block by block, in tiles as those of `blockwise`.

A row needs the sum of its weights before any power, and its largest excess so that no power
overflows. Both come from a pass over the keys, powers and values from another:

    first pass  T = sum_j a_j,  top = relu(N max_j a_j / T - O)
    second      e_j = relu(N a_j / T - O),  r_j = (e_j / top)^p,  P = sum_j r_j,
                out = sum_j r_j v_j / P
    kept        out, T, top, P and, of d_j = (e_j / top)^(p - 1), sum_j d_j and y = sum_j d_j v_j

    backward    with g_j = do v_j - do out,  h_j = dL/de_j = p / (top P) d_j g_j,
                the gradient of T is a sum over the row: sum_i h_i a_i = T / N (sum_i h_i e_i +
                O sum_i h_i), where sum_i h_i e_i = p sum_i r_i g_i / P = 0, so that
                da_j = (N h_j - O F) / T,  F = sum_i h_i = p / (top P) (do y - do out sum_i d_i)

so the backward pass too meets every tile once. Rows that are all equal, and all rows without
re-weighting, have weights a_j / T and da_j = g_j / T.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcm.ops.attention.blockwise import (
    Inputs,
    Places,
    Plan,
    Weigh,
    arranged,
    cut,
    dot,
    flat_rows,
    gradients,
    in_groups,
    over_keys,
    over_queries,
    score_tile,
    seen_tile,
)
from lcm.ops.attention.part import Part
from lcm.types import Array, Context, Queries, Values

FLAT = 1e-5  # excess over the average weight below which a row counts as all equal
SQUARED = 64  # powers up to which products are taken


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is known before tracing."""

    plan: Plan
    power: float | None


class _Row(NamedTuple):
    """Of each query, `[B, G, R, C, 1]`: weights are `even a + steep d x`, `x = e / top`.

    rate, offset, per: `e = relu(rate a - offset)`; N / T, O and 1 / T.
    steep, even: 1 / P and 0, or 0 and 1 / T where the row is all equal.
    """

    rate: Array
    offset: Array
    per: Array
    top: Array
    steep: Array
    even: Array


class _Kept(NamedTuple):
    """What the backward pass needs: `[B, L, H, K]`, and `[blocks, B, G, R, C, 1]`."""

    out: Array
    slope: Array  # y
    slopes: Array  # sum_j d_j
    row: _Row


def attend(
    parts: tuple[Part, ...],
    v_BSGK: Values,
    q_context: Context,
    k_context: Context,
    power: float | None,
) -> Queries:
    """Attention of queries to keys, both of length 1, in parts without a block map."""
    length, size = parts[0].q_BLHK.shape[1], parts[0].q_BLHK.shape[3]
    plan, inputs, places = arranged(parts, v_BSGK, q_context, k_context, 1.0)
    count = _counts(plan, places)
    scale = jnp.log(float(size)) * jnp.log(jnp.maximum(count, 1.0))
    inputs = inputs._replace(q=tuple((q * scale).astype(q.dtype) for q in inputs.q))
    return _attention(_Form(plan, power), inputs, places, count)[:, :length]


def _counts(plan: Plan, places: Places) -> Array:
    """N, how many keys each query sees in all parts, `[B, 1, 1, L, 1]`."""
    batch, length = places.q_pos.shape

    def block(i: int | Array, _: None) -> tuple[None, Array]:
        def span(start: int | Array, width: int, count: Array) -> Array:
            for n in range(len(plan.masks)):
                seen = seen_tile(plan, places, n, i, start, width)[2]
                count = count + seen.sum(-1, dtype=jnp.int32)
            return count

        return None, over_keys(plan, i, span, jnp.zeros((batch, 1, 1, plan.queries), jnp.int32))

    _, count = over_queries(plan, block, None, length)
    count = jnp.moveaxis(count, 0, 3).reshape(batch, 1, 1, length, 1)
    return count.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(form: _Form, inputs: Inputs, places: Places, count: Array) -> Queries:
    return _rows(form, inputs, places, count, False).out


def _forward(form: _Form, inputs: Inputs, places: Places, count: Array) -> tuple[Queries, Any]:
    kept = _rows(form, inputs, places, count, form.power is not None)
    return kept.out, (inputs, places, kept)


def _rows(form: _Form, inputs: Inputs, places: Places, count: Array, slopes: bool) -> _Kept:
    """All rows; `slopes` are needed for gradients alone."""
    plan = form.plan
    batch, kv_heads, shared, length, _ = inputs.q[0].shape
    empty = jnp.zeros((batch, kv_heads, shared, plan.queries, 1))

    def scores(i: int | Array, start: int | Array, width: int) -> list[Array]:
        tiles = (score_tile(plan, inputs, places, n, i, start, width) for n in range(len(inputs.q)))
        return [jnp.where(seen, mod(raw, inputs.weights), -jnp.inf) for raw, mod, seen in tiles]

    def block(i: int | Array, _: None) -> tuple[None, tuple]:
        def totals(start: int | Array, width: int, carry: tuple) -> tuple:
            total, largest = carry
            for score in scores(i, start, width):
                total = total + _softplus(score).sum(-1, keepdims=True)
                largest = jnp.maximum(largest, score.max(-1, keepdims=True))
            return total, largest

        def values(start: int | Array, width: int, carry: list[tuple]) -> list[tuple]:
            v = cut(inputs.v, start, width, 2)
            for score in scores(i, start, width):
                a = _softplus(score)
                carry = [
                    (sums + w.sum(-1, keepdims=True), out + _of_values(w, v, out.shape))
                    for (sums, out), w in zip(carry, _powers(form, row, a, slopes), strict=True)
                ]
            return carry

        total, largest = over_keys(plan, i, totals, (empty, jnp.full_like(empty, -jnp.inf)))
        row = _row(form, cut(count, i * plan.queries, plan.queries, 3), total, _softplus(largest))
        out = jnp.zeros((*empty.shape[:-1], inputs.v.shape[-1]))
        (sums, out), *slope = over_keys(plan, i, values, [(empty, out)] * (1 + slopes))
        inverse = 1 / jnp.where(sums > 0, sums, 1.0)
        row = row._replace(steep=row.steep * inverse, even=row.even * inverse)
        sloped = [(d, in_order(y)) for d, y in slope] or [(empty, empty)]
        return None, (in_order(out * inverse).astype(inputs.v.dtype), *sloped[0], row)

    def in_order(x: Array) -> Array:
        return x.transpose(0, 3, 1, 2, 4)

    def joined(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(batch, length, kv_heads * shared, -1)

    _, (out, d, y, row) = over_queries(plan, block, None, length)
    return _Kept(joined(out), joined(y) if slopes else y, d, row)


def _row(form: _Form, count: Array, total: Array, largest: Array) -> _Row:
    """What the first pass found, `steep` and `even` before they are divided by their sum."""
    per = 1 / jnp.where(total > 0, total, 1.0)
    rate, offset = count * per, jnp.broadcast_to(jnp.where(count > 3, 1.0, 0.0), total.shape)
    top = jax.nn.relu(rate * largest - offset)
    even = jnp.ones_like(top) if form.power is None else (top <= FLAT).astype(jnp.float32)
    return _Row(rate, offset, per, jnp.where(even > 0, 1.0, top), 1 - even, even)


def _powers(form: _Form, row: _Row, a: Array, slopes: bool) -> list[Array]:
    """Weights before their sum divides them, and d if asked for."""
    if form.power is None:
        return [a]
    x = _excess(row, a)
    d = _power(x, form.power - 1)
    return [jnp.where(row.even > 0, a, d * x), *([d] if slopes else [])]


def _backward(form: _Form, kept: tuple, d_out: Array) -> tuple[Inputs, None, None]:
    inputs, places, (out, slope, slopes, rows) = kept
    plan, wide = form.plan, d_out.astype(jnp.float32)
    along = lambda x: in_groups((wide * x.astype(jnp.float32)).sum(-1, keepdims=True), inputs)  # noqa: E731
    mean = along(out)
    sloped = None if form.power is None else along(slope)

    def weigh(i: int | Array) -> Weigh:
        own = lambda x: cut(x, i * plan.queries, plan.queries, 3)  # noqa: E731
        row, own_mean = jax.tree.map(lambda x: x[i], rows), own(mean)
        if form.power is not None:
            h = form.power * row.steep / row.top
            shift = row.offset * h * (own(sloped) - own_mean * slopes[i]) * row.per

        def tile(score: Array, seen: Array, d_p: Array) -> tuple[Array, Array]:
            a, sigmoid = _softplus_and_slope(score)
            a, g = jnp.where(seen, a, 0.0), d_p - own_mean
            p, d_a = row.even * a, row.even * g
            if form.power is not None:
                x = _excess(row, a)
                d = _power(x, form.power - 1)
                p, d_a = p + row.steep * (d * x), d_a + row.rate * h * d * g - shift
            return p, jnp.where(seen, d_a * sigmoid, 0.0)

        return tile

    return gradients(plan, inputs, places, d_out, weigh), None, None


_attention.defvjp(_forward, _backward)


def _excess(row: _Row, a: Array) -> Array:
    """x = e / top, at most 1 but for rounding."""
    return jax.nn.relu(row.rate * a - row.offset) * (1 / row.top)


def _softplus(score: Array) -> Array:
    """`log(1 + exp(s))`, in a third of the time of `jax.nn.softplus` on a CPU."""
    return jnp.maximum(score, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(score)))


def _softplus_and_slope(score: Array) -> tuple[Array, Array]:
    """Softplus and its derivative, the sigmoid, by one exponential."""
    small = jnp.exp(-jnp.abs(score))
    sigmoid = jnp.where(score >= 0, 1.0, small) / (1 + small)
    return jnp.maximum(score, 0.0) + jnp.log1p(small), sigmoid


def _power(x: Array, power: float) -> Array:
    """`x^power` for x >= 0, by squarings if it is whole; 0 at 0, for the power 0 too."""
    if power == 0:
        return (x > 0).astype(x.dtype)
    if power != int(power) or power > SQUARED:
        return x**power
    return jax.lax.integer_pow(x, int(power))


def _of_values(weights: Array, v: Array, shape: tuple[int, ...]) -> Array:
    return dot("bgms,bgsk->bgmk", flat_rows(weights, v), v).reshape(shape)
