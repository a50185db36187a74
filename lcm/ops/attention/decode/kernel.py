"""Decoding on TPUs: an online softmax over the pages that a row's queries may see.

    m' = max(m, max_j s_j)    l' = e^(m - m') l + sum_j e^(s_j - m')
    o' = e^(m - m') o + sum_j e^(s_j - m') v_j

Pages are counted as the sequence goes on: page n of a row has its tokens n T to (n + 1) T - 1 and
lies where the table says at n % N. What the queries see is one run of such pages, whether the ring
has wrapped or not; in a wrapped ring the page being written comes at both ends of the run. Only
the run is read (PagedAttention, arXiv:2309.06180; online softmax, arXiv:1805.02867).

Keys cached raw: a step reads tokens at positions a + t, and with a rotation U(p) to position p

    U(i) q . U(a + t) k_t  =  U(-a) U(i) q . U(t) k_t

so keys are rotated by one table for all steps, and queries go back by a constant turn from step to
step: no sine is taken in the kernel.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcm.ops.attention.decode.cache import Cache
from lcm.ops.attention.decode.layout import LANES, Layout
from lcm.ops.attention.decode.modification import Modification, split
from lcm.ops.attention.decode.reference import out_dtype
from lcm.ops.attention.decode.rotation import Rotation, turned, turns
from lcm.ops.attention.mask import FAR, Mask
from lcm.ops.attention.part import Partial
from lcm.ops.attention.score import ScoreMod
from lcm.types import Array, Queries

interpret = False  # run the kernel as plain JAX, for tests on a machine without a TPU
TOKENS = 512  # of a step, if they leave room in vector memory
BUFFERS = 8 << 20  # bytes of keys and values in flight, unless one page has more
VMEM_LIMIT = 32 << 20  # bytes; v5p and v7x have 64 MiB a core, v5e and v6e 128
FLOOR = -1e30  # below every score, above the -inf of a hidden one: where row maxima start
Q_POS, LOWER, UPPER = range(3)  # columns of integers; those of a score modification follow

Ref = Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts about one call."""

    layout: Layout
    page: int  # T
    table: int  # N
    pages: int  # of a step
    compute: jnp.dtype  # of what is multiplied
    pairs: int | None  # R, where keys are rotated
    mod: Modification | None
    quantised: bool

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.pages * self.page


class Run(NamedTuple):
    """First and last page that some query of a row sees, int32 `[B]`; 0 and -1 for none."""

    first: Array
    last: Array


def decode(
    q_BLHK: Queries,
    cache: Cache,
    mask: Mask,
    score_mod: ScoreMod | None,
    rotation: Rotation | None,
    scale: float,
) -> Partial:
    """Attention of the last L tokens of each row to the pages they may see.

    Raises:
        ValueError: if pages are not in whole tiles, or too large for vector memory, or a score
            modification looks up an array by the position of a key.
    """
    _, length, heads, size = q_BLHK.shape
    layout = Layout(length, heads, cache.kv_heads, size)
    pages = _pages_of_step(cache)
    tokens = pages * cache.page
    mod = None if score_mod is None else split(score_mod, layout.rows, tokens)
    quantised = cache.k_PTM.dtype == jnp.int8
    compute = q_BLHK.dtype if quantised else cache.k_PTM.dtype
    pairs = None if rotation is None else rotation.inv_freq_R.shape[0]
    table = cache.slots // cache.page
    plan = Plan(layout, cache.page, table, pages, compute, pairs, mod, quantised)

    q_pos = cache.lengths_B[:, None] - length + jnp.arange(length, dtype=jnp.int32)
    lower, upper = _seen(mask, q_pos, cache)
    run = _run(lower, upper, cache.page)
    columns = [(q_pos, 0), (lower, 0), (upper, -1)]
    columns = [layout.columns(x, padding) for x, padding in columns]
    scalars, real = [], []
    if mod is not None:
        for x in mod.numbers(score_mod, columns[Q_POS], layout.head_numbers()):
            floating = jnp.issubdtype(x.dtype, jnp.floating)
            (scalars if x.ndim == 0 else real if floating else columns).append(x)
    q = (q_BLHK.astype(jnp.float32) * scale).astype(compute)
    tables = []
    if rotation is not None:
        back = jnp.broadcast_to(-run.first[:, None] * cache.page, q_pos.shape)
        q = Rotation(rotation.inv_freq_R)(q.astype(jnp.float32), back)
        step = Rotation(rotation.inv_freq_R)
        tables = [
            turns(rotation, jnp.arange(tokens), size, layout.together),
            turns(step, jnp.array([-tokens]), size, layout.together),
        ]
    known = [_stacked(columns, jnp.int32), *([_stacked(real, jnp.float32)] if real else [])]
    out, lse = _call(
        plan, run, cache, scalars, layout.spread(q), known, tables, out_dtype(q_BLHK, cache), mask
    )
    lse = lse[:, :, : layout.used, 0].reshape(-1, heads, length)
    return Partial(layout.collect(out), layout.per_query(lse))


def _pages_of_step(cache: Cache) -> int:
    """How many pages a step takes, if pages are of a size that a TPU can take."""
    page, width = cache.page, cache.k_PTM.shape[2]
    itemsize = cache.k_PTM.dtype.itemsize
    tile = 32 // itemsize
    if page % tile:
        raise ValueError(
            f"pages of {page} tokens are not whole tiles of {tile} in {cache.k_PTM.dtype}: build "
            f'the cache with a multiple of {tile}, or use backend="reference"'
        )
    flight = 4 * page * width * itemsize  # keys and values, one step ahead
    if flight > VMEM_LIMIT // 2:
        raise ValueError(
            f"pages of {page} tokens take {flight} bytes of vector memory, at most "
            f"{VMEM_LIMIT // 2} are to be had: build the cache with smaller pages"
        )
    return max(1, min(TOKENS // page, BUFFERS // flight, cache.slots // page))


def _seen(mask: Mask, q_pos: Array, cache: Cache) -> tuple[Array, Array]:
    """First and last position that each query sees of those its row holds; 0 and -1 for none."""
    lower, upper = mask.interval(q_pos)
    lengths = cache.lengths_B[:, None]
    lower = jnp.maximum(lower, jnp.maximum(lengths - cache.slots, 0))
    upper = jnp.minimum(upper, lengths - 1)
    some = (lower <= upper) & (q_pos >= 0)
    return jnp.where(some, lower, 0), jnp.where(some, upper, -1)


def _run(lower: Array, upper: Array, page: int) -> Run:
    last = upper.max(1) // page  # -1 if there is none
    first = jnp.where(upper < 0, FAR, lower).min(1) // page
    return Run(jnp.where(last < 0, 0, first), last)


def _stacked(columns: list[Array], dtype: jnp.dtype) -> Array:
    return jnp.concatenate([x.astype(dtype) for x in columns], -1)


def _call(
    plan: Plan,
    run: Run,
    cache: Cache,
    scalars: list[Array],
    q: Array,
    known: list[Array],
    tables: list[Array],
    dtype: jnp.dtype,
    mask: Mask,
) -> tuple[Array, Array]:
    """Outputs `[B, groups, rows, W]` and log-sums `[B, groups, rows, 1]`."""
    batch, (groups, rows, width) = q.shape[0], q.shape[1:]
    steps = jnp.maximum(1, pl.cdiv((run.last - run.first + 1).max(), plan.pages))
    prefetched = [run.first, run.last, cache.pages_BN.reshape(-1)]
    if plan.mod is not None:
        prefetched += [_scalars(scalars, floating) for floating in (False, True)]
    of_row = lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda b, s, *_: (b, 0, 0, 0))  # noqa: E731
    of_all = lambda x: pl.BlockSpec(x.shape, lambda b, s, *_: (0,) * x.ndim)  # noqa: E731
    paged = [cache.k_PTM, cache.v_PTM]
    paged += [cache.k_scale_PGT, cache.v_scale_PGT] if plan.quantised else []
    fixed = [q, *known]
    out = (
        jax.ShapeDtypeStruct((batch, groups, rows, width), dtype),
        jax.ShapeDtypeStruct((batch, groups, rows, 1), jnp.float32),
    )
    turning = [pltpu.VMEM((groups, rows, width), jnp.float32)] if tables else []
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(batch, steps),
            in_specs=[
                *[of_row(x) for x in fixed],
                *[of_all(x) for x in tables],
                *[_page(plan, x, n) for x in paged for n in range(plan.pages)],
            ],
            out_specs=[of_row(x) for x in out],
            scratch_shapes=[
                pltpu.VMEM((groups, rows, LANES), jnp.float32),
                pltpu.VMEM((groups, rows, LANES), jnp.float32),
                pltpu.VMEM((groups, rows, width), jnp.float32),
                *turning,
            ],
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=_cost(plan, cache, mask, (*fixed, *out)),
        interpret=interpret,
        name="attention_decode",
    )(*prefetched, *fixed, *tables, *[x for x in paged for _ in range(plan.pages)])


def _page(plan: Plan, x: Array, n: int) -> pl.BlockSpec:
    """The n-th page of a step. Past the end of the run the last one stays, so nothing is read."""

    def index(b: Array, s: Array, first: Ref, last: Ref, table: Ref, *_: Ref) -> tuple:
        at = first[b] + n
        ahead = jax.lax.div(jnp.maximum(last[b] - at, 0), plan.pages)
        page = at + plan.pages * jnp.minimum(s, ahead)
        number = table[b * plan.table + jax.lax.rem(page, plan.table)]
        return jnp.where(at <= last[b], jnp.maximum(number, 0), 0), 0, 0

    return pl.BlockSpec((None, *x.shape[1:]), index)


def _scalars(scalars: list[Array], floating: bool) -> Array:
    """Numbers of a score modification that are for all rows, never an empty array."""
    dtype = jnp.float32 if floating else jnp.int32
    some = [x for x in scalars if jnp.issubdtype(x.dtype, jnp.floating) == floating]
    return jnp.stack([x.astype(dtype) for x in some] or [jnp.zeros((), dtype)])


def _cost(plan: Plan, cache: Cache, mask: Mask, arrays: Sequence[Array]) -> pl.CostEstimate:
    """Work on full rows, as far as the mask's reach is known before it runs.

    FLOPs count what is asked for, not the zeros of `layout`.
    """
    layout, batch = plan.layout, len(cache.lengths_B)
    below, above = mask.reach()
    seen = cache.slots if None in (below, above) else above - below + layout.length
    seen = min(seen, cache.slots)
    pairs = batch * layout.heads * layout.length * seen
    token = sum(
        x.shape[1] * x.shape[2] * x.dtype.itemsize // plan.page
        for x in (cache.k_PTM, cache.v_PTM, cache.k_scale_PGT, cache.v_scale_PGT)
        if x is not None
    )
    once = sum(x.size * jnp.dtype(x.dtype).itemsize for x in arrays)
    return pl.CostEstimate(
        flops=4 * layout.size * pairs,
        bytes_accessed=batch * seen * token + once,
        transcendentals=pairs,
    )


def _kernel(plan: Plan, first: Ref, last: Ref, table: Ref, *refs: Ref) -> None:
    refs = iter(refs)
    take = lambda count: [next(refs) for _ in range(count)]  # noqa: E731
    numbers = take(0 if plan.mod is None else 2)
    q, integers = take(2)
    real = take(1) if plan.mod is not None and _floats(plan.mod) else []
    tables = take(0 if plan.pairs is None else 2)
    k, v = take(plan.pages), take(plan.pages)
    k_scale, v_scale = (take(plan.pages if plan.quantised else 0) for _ in range(2))
    out, lse, top, total, acc = take(5)
    queries = next(refs, q)
    b, s = pl.program_id(0), pl.program_id(1)
    page = first[b] + s * plan.pages
    width = plan.layout.width

    @pl.when(s == 0)
    def _():
        top[...] = jnp.full_like(top, FLOOR)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)
        if tables:
            queries[...] = q[...]

    def add(group: int) -> None:
        lanes = slice(group * width, (group + 1) * width)
        keys = _joined(k, lanes, plan.compute)
        if tables:
            rows = [tables[0][n] for n in range(tables[0].shape[0])]
            keys = turned(keys.astype(jnp.float32), rows, plan.pairs).astype(plan.compute)
        score = _dot(queries[group].astype(plan.compute), keys, 1)
        if k_scale:
            score = score * _per_row(plan, k_scale, group)
        k_pos = page * plan.page + jax.lax.broadcasted_iota(jnp.int32, (1, plan.tokens), 1)
        column = lambda n: integers[group][:, n : n + 1]  # noqa: E731
        if plan.mod is not None:
            given = _given(plan.mod, numbers, integers[group], [x[group] for x in real])
            score = plan.mod(score, k_pos, column(Q_POS), given)
        seen = (column(LOWER) <= k_pos) & (k_pos <= column(UPPER))
        score = jnp.where(seen, score, -jnp.inf)
        before = top[group][:, :1]
        highest = jnp.maximum(before, score.max(-1, keepdims=True))
        weights, fade = jnp.exp(score - highest), jnp.exp(before - highest)
        top[group] = jnp.broadcast_to(highest, top.shape[1:])
        total[group] = total[group] * fade + weights.sum(-1, keepdims=True)
        if v_scale:
            weights = weights * _per_row(plan, v_scale, group)
        values = _joined(v, lanes, plan.compute)
        acc[group] = acc[group] * fade + _dot(weights.astype(plan.compute), values, 0)

    @pl.when(page <= last[b])
    def _():
        for group in range(plan.layout.groups):
            add(group)
            if tables:  # to the next step
                rows = [tables[1][n] for n in range(tables[1].shape[0])]
                queries[group] = turned(queries[group], rows, plan.pairs)

    @pl.when(s == pl.num_programs(1) - 1)
    def _():
        weight = total[...][:, :, :1]
        some = weight > 0
        out[...] = (acc[...] * jnp.where(some, 1 / weight, 0.0)).astype(out.dtype)
        lse[...] = jnp.where(some, top[...][:, :, :1] + jnp.log(weight), -jnp.inf)


def _joined(pages: Sequence[Ref], lanes: slice, dtype: jnp.dtype) -> Array:
    """Some lanes of all pages of a step, one page below the other."""
    return jnp.concatenate([page[:, lanes] for page in pages]).astype(dtype)


def _per_row(plan: Plan, scales: Sequence[Ref], group: int) -> Array:
    """Scales of a group's heads `[G, T]` a page, as `[rows, tokens]`."""
    layout = plan.layout
    each = layout.used // layout.together
    head = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (layout.rows, 1), 0), each)
    scale = jnp.zeros((layout.rows, plan.tokens), jnp.float32)
    for n in range(layout.together):
        at = group * layout.together + n
        row = jnp.concatenate([page[at : at + 1] for page in scales], 1)
        scale = jnp.where(head == n, row, scale)
    return scale


def _floats(mod: Modification) -> bool:
    """Whether columns of floats enter the kernel."""
    return any(x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.floating) for x in mod.crossing)


def _given(
    mod: Modification, scalars: Sequence[Ref], integers: Array, real: Sequence[Array]
) -> Iterator[Array]:
    """What crosses into the kernel, in order, from where `decode` put it."""
    at = {"integer": iter(range(UPPER + 1, integers.shape[1])), "float": iter(range(LANES))}
    scalar_at = {"integer": iter(range(LANES)), "float": iter(range(LANES))}
    for aval in mod.crossing:
        kind = "float" if jnp.issubdtype(aval.dtype, jnp.floating) else "integer"
        if mod.is_column(aval):
            n = next(at[kind])
            yield (real[0] if kind == "float" else integers)[:, n : n + 1]
        else:
            yield scalars[kind == "float"][next(scalar_at[kind])]


def _dot(a: Array, b: Array, axis: int) -> Array:
    """Rows of a by rows (axis 1) or columns (axis 0) of b, summed in float32, exact in it."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
