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

from lcm.ops.attention.pallas import plan as plans
from lcm.ops.attention.pallas.kernel import (
    FLOOR,
    LN2,
    QueryGrid,
    Ref,
    Runs,
    dot,
    each_part,
    modified,
    own,
    scores,
    visible,
    wide,
)
from lcm.ops.attention.pallas.plan import LANES, Plan
from lcm.ops.attention.pallas.tiles import POSITION
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
) -> tuple[Array, Array]:
    """Output `[B, H, L, K]` and log-sum-exp `[B, H, 1, L]`, from queries scaled to base 2."""
    batch, heads, length, size = q[0].shape
    blocks = length // plan.queries
    runs = Runs(batch, blocks)

    blocked = QueryGrid(plan, runs, size)
    rows, columns = q_info.shape[1], k_info.shape[1]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(batch, heads, blocks, steps),
        in_specs=[
            blocked.q_info(rows),
            blocked.k_info(columns),
            blocked.tables(),
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
        ],
    )
    out = (
        jax.ShapeDtypeStruct((batch, heads, length, size), v.dtype),
        jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
    )
    return pl.pallas_call(
        functools.partial(_kernel, plan, runs),
        grid_spec=grid,
        out_shape=out,
        compiler_params=plans.parameters(3, 1),
        cost_estimate=plans.cost(plan, (*q, *k, v), out, matmuls=2),
        interpret=plan.interpret,
        name="attention_forward",
    )(table, integers, floats, q_info, k_info, tables, *q, *k, v)


def _kernel(
    plan: Plan,
    runs: Runs,
    table: Ref,
    integers: Ref,
    floats: Ref,
    q_info: Ref,
    k_info: Ref,
    tables: Ref,
    *refs: Ref,
) -> None:
    count = len(plan.rows)
    q, k, (v, out, lse, top, total, acc, columns) = (
        refs[:count],
        refs[count : 2 * count],
        refs[2 * count :],
    )
    b, h, i, t = (pl.program_id(axis) for axis in range(4))

    @pl.when(t == 0)
    def _():
        top[...] = jnp.full_like(top, FLOOR)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)
        columns[...] = q_info[...].T

    def add(n: int, masked: bool) -> None:
        """Some rows at a time, with the matmul of the next ones already under way."""
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
            mine = own(plan, n, integers, floats, tables, h)
            raw = modified(mod, raw, of_query(POSITION), of_key(POSITION), mine)
        score = scores(raw, mod is not None, visible(plan, n, of_query, of_key) if masked else None)
        before = top[at]
        highest = jnp.maximum(before, score.max(-1, keepdims=True))
        weights = jnp.exp2(score - wide(highest, plan.keys))
        fade = jnp.exp2(before - highest)
        top[at] = highest
        total[at] = total[at] * fade + _lanes(weights)
        acc[at] = acc[at] * wide(fade, acc.shape[1]) + dot(weights.astype(v.dtype), v[...], (1, 0))

    each_part(plan, runs, table, (b, i, runs.at(table, b, i, t)), add)

    @pl.when(t == pl.num_programs(3) - 1)
    def _():
        row = total[...].T.sum(0, keepdims=True)
        inverse = jnp.broadcast_to(jnp.where(row > 0, 1 / row, 0.0), (LANES, plan.queries)).T
        out[...] = (acc[...] * wide(inverse, acc.shape[1])).astype(out.dtype)
        logs = jnp.log(row) + top[...].T[:1] * LN2
        lse[...] = jnp.where(row > 0, logs, -jnp.inf)


def _lanes(x: Array) -> Array:
    """Sums over columns of equal lane."""
    return sum(x[:, at : at + LANES] for at in range(0, x.shape[1], LANES))
