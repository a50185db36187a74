"""Forward kernel: online softmax over the blocks of keys that a block of queries may see.

    m' = max(m, max_j s_j)    l' = 2^(m - m') l + sum_j 2^(s_j - m')    (s to base 2)
    o' = 2^(m - m') o + sum_j 2^(s_j - m') v_j

Rows of `m` are repeated along lanes. `l` keeps one partial sum a lane: they are added once, at the
end, since sums along lanes are dear (Dao et al., arXiv:2205.14135, on the layout of a TPU).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcm.ops.attention.pallas import maps
from lcm.ops.attention.pallas import plan as plans
from lcm.ops.attention.pallas.kernel import (
    FLOOR,
    LN2,
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

ROWS = 128  # of a tile at once


def forward(
    plan: Plan,
    q: tuple[Array, ...],
    k: tuple[Array, ...],
    v: Array,
    q_info: Array,
    k_info: Array,
    table: Array,
    steps: Array,
    integers: Array,
    floats: Array,
    tables: Array,
    lists: tuple[Array, ...],
) -> tuple[Array, Array]:
    """Output `[B, H, L, K]` and log-sum-exp `[B, H, 1, L]`, from queries scaled to base 2."""
    batch, heads, length, size = q[0].shape
    blocks = length // plan.queries
    walk = plan.walk(batch, blocks, of_keys=False)
    blocks, _, steps = walk.grid(1, steps)
    blocked = QueryGrid(plan, walk, size)
    rows, columns = q_info.shape[1], k_info.shape[1]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(batch, heads, blocks, steps),
        in_specs=[
            blocked.q_info(rows),
            blocked.k_info(columns),
            blocked.tables(),
            *[blocked.lists(x) for x in lists],
            *[blocked.queries() for _ in q],
            *[blocked.keys(n) for n in range(len(k))],
            blocked.keys(*plan.parts),
        ],
        out_specs=[blocked.queries(), blocked.statistic()],
        scratch_shapes=[
            pltpu.VMEM((plan.queries, LANES), jnp.float32),
            pltpu.VMEM((plan.queries, LANES), jnp.float32),
            pltpu.VMEM((plan.queries, size), jnp.float32),
            pltpu.VMEM((plan.queries, rows), jnp.int32),
            *[pltpu.VMEM((plan.queries, 8), jnp.int32) for _ in lists],
        ],
    )
    out = (
        jax.ShapeDtypeStruct((batch, heads, length, size), v.dtype),
        jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
    )
    return pl.pallas_call(
        functools.partial(_kernel, plan, blocked),
        grid_spec=grid,
        out_shape=out,
        compiler_params=parameters(3, 1),
        cost_estimate=plans.cost(plan, (*q, *k, v), out, matmuls=2),
        interpret=plan.interpret,
        name="attention_forward",
    )(table, integers, floats, q_info, k_info, tables, *lists, *q, *k, v)


def _kernel(
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
    count, mapped, refs = len(plan.rows), plan.lists(len(plan.maps)), iter(refs)
    take = lambda count: [next(refs) for _ in range(count)]  # noqa: E731
    lists, q, k, (v, out, lse) = take(mapped), take(count), take(count), take(3)
    (top, total, acc, columns), words = take(4), take(mapped)
    walk, step = blocked.walk, blocked.step(*(pl.program_id(axis) for axis in range(4)))
    starts, ends = walk.ends(table, step, 1, pl.num_programs(3))
    first = functools.partial(first_block, plan, k_block=walk.other(table, step))

    @pl.when(starts)
    def _():
        top[...] = jnp.full_like(top, FLOOR)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)
        columns[...] = q_info[...].T

    def add(n: int, masked: bool) -> None:
        """Some rows at a time, with the matmul of the next ones already under way."""
        if masked and plan.maps[n] is not None:
            n_list = plan.lists(n)
            words[n_list][...] = column(maps.words(lists[n_list][...], first(n)), 8)
        spans = [pl.ds(at, ROWS) for at in range(0, plan.queries, ROWS)]
        raw = dot(q[n][spans[0]], k[n][...], (1, 1))
        for at, following in zip(spans, [*spans[1:], None], strict=True):
            ahead = None if following is None else dot(q[n][following], k[n][...], (1, 1))
            add_rows(n, masked, at, raw)
            raw = ahead

    def add_rows(n: int, masked: bool, at: pl.Slice, raw: Array) -> None:
        of_query = lambda row: columns[at, row : row + 1]  # noqa: E731
        of_key = lambda row: k_info[row : row + 1]  # noqa: E731
        if (mod := plan.mods[n]) is not None:
            mine = own(plan, n, integers, floats, tables, step.head)
            raw = modified(mod, raw, of_query(POSITION), of_key(POSITION), mine)
        seen = None
        if masked:
            with_map = plan.maps[n] is not None
            word = (words[plan.lists(n)][at, :1], first(n)) if with_map else (None, None)
            seen = visible(plan, n, of_query, of_key, *word)
        score = scores(raw, mod is not None, seen)
        before = top[at]
        highest = jnp.maximum(before, score.max(-1, keepdims=True))
        weights = jnp.exp2(score - wide(highest, plan.keys))
        fade = jnp.exp2(before - highest)
        top[at] = highest
        total[at] = total[at] * fade + _lanes(weights)
        acc[at] = acc[at] * wide(fade, acc.shape[1]) + dot(weights.astype(v.dtype), v[...], (1, 0))

    each_part(plan, walk, table, step, add)

    @pl.when(ends)
    def _():
        row = total[...].T.sum(0, keepdims=True)
        inverse = jnp.broadcast_to(jnp.where(row > 0, 1 / row, 0.0), (LANES, plan.queries)).T
        out[...] = (acc[...] * wide(inverse, acc.shape[1])).astype(out.dtype)
        logs = jnp.log(row) + top[...].T[:1] * LN2
        lse[...] = jnp.where(row > 0, logs, -jnp.inf)


def _lanes(x: Array) -> Array:
    """Sums over columns of equal lane."""
    return sum(x[:, at : at + LANES] for at in range(0, x.shape[1], LANES))
