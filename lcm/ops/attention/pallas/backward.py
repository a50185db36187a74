"""Backward kernels: each tile of scores is computed again, by queries and by keys.

    p = 2^(s - lse)    ds = p (do v^T - delta)    delta = sum_k do o - d_lse
    dq = ds k          dk = ds^T q                dv = p^T do

A gradient of the log-sum-exp adds p to ds, so it only moves delta. The kernel of queries also sums
the gradients of the numbers of score modifications, which belong to a query head, from unrounded
ds. In bfloat16 they are as uncertain as delta, whose o is rounded and a sum of rounded p: some 2 %
of ALiBi's slopes, in every backend (tests/ops/pallas/slope_oracle.py).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcm.ops.attention.pallas import maps
from lcm.ops.attention.pallas import plan as plans
from lcm.ops.attention.pallas.kernel import (
    LN2,
    KeyGrid,
    Own,
    QueryGrid,
    Ref,
    column,
    dot,
    each_part,
    first_block,
    modified,
    own,
    scores,
    visible,
    wide,
)
from lcm.ops.attention.pallas.plan import Plan
from lcm.ops.attention.pallas.tiles import POSITION
from lcm.ops.tpu import LANES, parameters
from lcm.types import Array


class Given(NamedTuple):
    """What both kernels read; `lse` to base 2 and `delta` are `[B, H, 1, L]`."""

    q: tuple[Array, ...]
    k: tuple[Array, ...]
    v: Array
    floats: Array
    tables: Array
    d_out: Array
    lse: Array
    delta: Array
    q_info: Array
    k_info: Array
    integers: Array
    lists: tuple[Array, ...]


def of_queries(
    plan: Plan, given: Given, table: Array, steps: Array
) -> tuple[tuple[Array, ...], Array, Array]:
    """Gradients of each part's queries, and of numbers and tables of score modifications."""
    batch, heads, length, size = given.q[0].shape
    walk = plan.walk(batch, length // plan.queries, of_keys=False)
    blocks, _, steps = walk.grid(1, steps)
    blocked = QueryGrid(plan, walk, size)
    rows, columns = given.q_info.shape[1], given.k_info.shape[1]
    arrays = *given.q, *given.k, given.v, given.d_out, given.lse, given.delta
    looked_up = given.tables, *given.lists
    out = (
        *[jax.ShapeDtypeStruct(q.shape, q.dtype) for q in given.q],
        jax.ShapeDtypeStruct((batch, heads, plan.floats, LANES), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, 1, plan.lanes), jnp.float32),
    )
    *d_q, d_floats, d_tables = pl.pallas_call(
        functools.partial(_query_kernel, plan, blocked),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, blocks, steps),
            in_specs=[
                blocked.q_info(rows),
                blocked.k_info(columns),
                blocked.tables(),
                *[blocked.lists(x) for x in given.lists],
                *[blocked.queries() for _ in given.q],
                *[blocked.keys(n) for n in range(len(given.k))],
                blocked.keys(*plan.parts),
                blocked.queries(),
                blocked.statistic(),
                blocked.statistic(),
            ],
            out_specs=[
                *[blocked.queries() for _ in given.q],
                pl.BlockSpec((None, None, plan.floats, LANES), lambda b, h, *_: (b, h, 0, 0)),
                pl.BlockSpec((None, None, 1, plan.lanes), lambda b, h, *_: (b, h, 0, 0)),
            ],
            scratch_shapes=[
                *[pltpu.VMEM((plan.queries, size), jnp.float32) for _ in given.q],
                pltpu.VMEM((plan.queries, rows), jnp.int32),
                pltpu.VMEM((plan.queries, LANES), jnp.float32),
                pltpu.VMEM((plan.queries, LANES), jnp.float32),
            ],
        ),
        out_shape=out,
        compiler_params=parameters(2, 2),
        cost_estimate=plans.cost(plan, arrays, out, matmuls=3),
        interpret=plan.interpret,
        name="attention_queries_gradient",
    )(table, given.integers, given.floats, given.q_info, given.k_info, *looked_up, *arrays)
    d_floats = d_floats[..., 0].sum(0).T.reshape(-1)
    return tuple(d_q), d_floats[: given.floats.size], d_tables.sum(0)


def _query_kernel(
    plan: Plan,
    blocked: QueryGrid,
    table: Ref,
    integers: Ref,
    floats: Ref,
    q_info: Ref,
    k_info: Ref,
    tables: Ref,
    *refs: Ref,
) -> None:
    parts, mapped, refs = len(plan.rows), plan.lists(len(plan.maps)), iter(refs)
    take = lambda count: [next(refs) for _ in range(count)]  # noqa: E731
    lists, q, k, (v, d_out, lse, delta) = take(mapped), take(parts), take(parts), take(4)
    d_q, (d_floats, d_tables), acc = take(parts), take(2), take(parts)
    columns, lse_wide, delta_wide = take(3)
    walk, step = blocked.walk, blocked.step(*(pl.program_id(axis) for axis in range(4)))
    starts, ends = walk.ends(table, step, 1, pl.num_programs(3))

    @pl.when((step.own == 0) & (step.t == 0))
    def _():
        d_floats[...] = jnp.zeros_like(d_floats)
        d_tables[...] = jnp.zeros_like(d_tables)

    @pl.when(starts)
    def _():
        columns[...] = q_info[...].T
        for row, wider in ((lse, lse_wide), (delta, delta_wide)):
            wider[...] = column(row[...])
        for total in acc:
            total[...] = jnp.zeros_like(total)

    def add(n: int, masked: bool) -> None:
        of_query = lambda row: columns[:, row : row + 1]  # noqa: E731
        of_key = lambda row: k_info[row : row + 1]  # noqa: E731
        raw, mod = dot(q[n][...], k[n][...], (1, 1)), plan.mods[n]
        if mod is not None:
            whole, *real = own(plan, n, integers, floats, tables, step.head)
            modify = lambda raw, *real: modified(  # noqa: E731
                mod, raw, of_query(POSITION), of_key(POSITION), Own(whole, *real)
            )
            raw, pull = jax.vjp(modify, raw, *real)
        word = first = seen = None
        if masked and plan.maps[n] is not None:
            first = first_block(plan, n, walk.other(table, step))
            word = column(maps.words(lists[plan.lists(n)][...], first), 8)[:, :1]
        if masked:
            seen = visible(plan, n, of_query, of_key, word, first)
        score = scores(raw, mod is not None, seen)
        p = jnp.exp2(score - wide(lse_wide[...], plan.keys))
        d_p = dot(d_out[...], v[...], (1, 1))
        d_score = p * (d_p - wide(delta_wide[...], plan.keys))
        if mod is not None:
            d_score, d_real, d_own_tables = pull(d_score)
            _, first, at = plan.slots(n)
            for m, d in enumerate(d_real, first):
                d_floats[m : m + 1] += jnp.full((1, LANES), d)
            for d in d_own_tables:
                d_tables[:, at : at + d.shape[1]] += d
                at += d.shape[1]
        acc[n][...] += dot(d_score.astype(k[n].dtype), k[n][...], (1, 0))

    each_part(plan, walk, table, step, add)

    @pl.when(ends)
    def _():
        for d, total, mod in zip(d_q, acc, plan.mods, strict=True):
            d[...] = (total[...] * (LN2 if mod is None else 1.0)).astype(d.dtype)


def of_keys(
    plan: Plan, given: Given, table: Array, steps: Array
) -> tuple[tuple[Array, ...], Array]:
    """Gradients of each part's keys and of the values; tiles are keys by queries."""
    batch, kv_heads, slots, size = given.v.shape
    walk = plan.walk(batch, slots // plan.keys, of_keys=True)
    blocks, shared, steps = walk.grid(plan.shared, steps)
    blocked = KeyGrid(plan, walk, size)
    rows, columns = given.q_info.shape[1], given.k_info.shape[1]
    arrays = *given.q, *given.k, given.v, given.d_out, given.lse, given.delta
    looked_up = given.tables, *given.lists
    out = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*given.k, given.v))
    *d_k, d_v = pl.pallas_call(
        functools.partial(_key_kernel, plan, blocked),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, kv_heads, blocks, shared, steps),
            in_specs=[
                blocked.q_info(rows),
                blocked.k_info(columns),
                blocked.tables(),
                *[blocked.lists(x) for x in given.lists],
                *[blocked.queries(n) for n in range(len(given.q))],
                *[blocked.keys() for _ in given.k],
                blocked.keys(),
                blocked.queries(*plan.parts),
                blocked.statistic(),
                blocked.statistic(),
            ],
            out_specs=[blocked.keys() for _ in out],
            scratch_shapes=[
                *[pltpu.VMEM((plan.keys, size), jnp.float32) for _ in out],
                pltpu.VMEM((plan.keys, columns), jnp.int32),
            ],
        ),
        out_shape=out,
        compiler_params=parameters(3, 2),
        cost_estimate=plans.cost(plan, arrays, out, matmuls=4),
        interpret=plan.interpret,
        name="attention_keys_gradient",
    )(table, given.integers, given.floats, given.q_info, given.k_info, *looked_up, *arrays)
    return tuple(d_k), d_v


def _key_kernel(
    plan: Plan,
    blocked: KeyGrid,
    table: Ref,
    integers: Ref,
    floats: Ref,
    q_info: Ref,
    k_info: Ref,
    tables: Ref,
    *refs: Ref,
) -> None:
    parts, mapped, refs = len(plan.rows), plan.lists(len(plan.maps)), iter(refs)
    take = lambda count: [next(refs) for _ in range(count)]  # noqa: E731
    lists, q, k, (v, d_out, lse, delta) = take(mapped), take(parts), take(parts), take(4)
    d_kv, acc, (columns,) = take(parts + 1), take(parts + 1), take(1)
    walk, step = blocked.walk, blocked.step(*(pl.program_id(axis) for axis in range(5)))
    starts, ends = walk.ends(table, step, plan.shared, pl.num_programs(4))

    @pl.when(starts)
    def _():
        columns[...] = k_info[...].T
        for total in acc:
            total[...] = jnp.zeros_like(total)

    def add(n: int, masked: bool) -> None:
        of_query = lambda row: q_info[row : row + 1]  # noqa: E731
        of_key = lambda row: columns[:, row : row + 1]  # noqa: E731
        raw, mod = dot(k[n][...], q[n][...], (1, 1)), plan.mods[n]
        if mod is not None:
            mine = own(plan, n, integers, floats, tables, blocked.head(table, step))
            modify = lambda raw: modified(  # noqa: E731
                mod, raw, of_query(POSITION), of_key(POSITION), mine
            )
            raw, pull = jax.vjp(modify, raw)
        word = first = seen = None
        if masked and plan.maps[n] is not None:
            first = first_block(plan, n, walk.own(table, step))
            word = maps.words(lists[plan.lists(n)][...], first)
        if masked:
            seen = visible(plan, n, of_query, of_key, word, first)
        p = jnp.exp2(scores(raw, mod is not None, seen) - lse[...])
        acc[-1][...] += dot(p.astype(d_out.dtype), d_out[...], (1, 0))
        d_p = dot(v[...], d_out[...], (1, 1))
        d_score = p * (d_p - delta[...])
        if mod is not None:
            (d_score,) = pull(d_score)
        acc[n][...] += dot(d_score.astype(q[n].dtype), q[n][...], (1, 0))

    each_part(plan, walk, table, step, add)

    @pl.when(ends)
    def _():
        for d, total, mod in zip(d_kv[:-1], acc[:-1], plan.mods, strict=True):
            d[...] = (total[...] * (LN2 if mod is None else 1.0)).astype(d.dtype)
        d_kv[-1][...] = acc[-1][...].astype(d_kv[-1].dtype)
