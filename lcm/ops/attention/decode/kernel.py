"""Decoding on TPUs: an online softmax over the pages that a row's queries may see.

    m' = max(m, max_j s_j)    l' = e^(m - m') l + sum_j e^(s_j - m')
    o' = e^(m - m') o + sum_j e^(s_j - m') v_j

Pages are counted as the sequence goes on: page n of a row has its tokens n T to (n + 1) T - 1 and
lies where the table says at n % N. What the queries see is one run of such pages, whether the ring
has wrapped or not; in a wrapped ring the page being written comes at both ends of the run. Only
the run is read (PagedAttention, arXiv:2309.06180; online softmax, arXiv:1805.02867).

Keys cached raw: a step reads tokens at positions a + t, and with a rotation U(p) to position p

    U(i) q . U(a + t) k_t  =  U(-a) U(i) q . U(t) k_t

so keys take one table for all steps, and queries go back by a constant turn from step to step: no
sine is taken in the kernel. Nor are halves of heads exchanged there, see `rotation.turns`.

Row maxima and what follows from them are repeated along lanes; sums keep one partial a lane and are
added at the end, since sums along lanes are dear.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcm.ops.attention.decode import crossing
from lcm.ops.attention.decode.cache import Cache
from lcm.ops.attention.decode.layout import LANES, Layout
from lcm.ops.attention.decode.reference import out_dtype
from lcm.ops.attention.decode.rotation import Rotation, swapped, turns
from lcm.ops.attention.mask import FAR, Mask
from lcm.ops.attention.modification import Modification, Split, is_floating
from lcm.ops.attention.part import Partial
from lcm.ops.attention.score import ScoreMod
from lcm.ops.tpu import VMEM_LIMIT, parameters
from lcm.types import Array, Queries

interpret = False  # run the kernel as plain JAX, for tests on a machine without a TPU
TOKENS = 512  # of a step, if they leave room in vector memory
BUFFERS = 8 << 20  # bytes of keys and values in flight, unless one page has more
FLOOR = -1e30  # below every score, above the -inf of a hidden one: where row maxima start
LOWER, UPPER = range(2)  # columns of integers, before those of a score modification

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
    def split(self) -> Split | None:
        """The score modification for a group's rows and a step's tokens."""
        return self.mod and self.mod.for_rows(self.layout.rows, self.tokens)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.pages * self.page

    @property
    def most_steps(self) -> int:
        """Of a row; in a ring that has wrapped, N + 1 pages are seen."""
        return -(-(self.table + 1) // self.pages)


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
            modification looks up more by the position of a key than a kernel can.
    """
    _, length, heads, size = q_BLHK.shape
    layout = Layout(length, heads, cache.kv_heads, size)
    pages = _pages_of_step(cache)
    tokens = pages * cache.page
    mod = None if score_mod is None else Modification.of(score_mod)
    quantised = cache.k_PTM.dtype == jnp.int8
    compute = q_BLHK.dtype if quantised else cache.k_PTM.dtype
    pairs = None if rotation is None else rotation.inv_freq_R.shape[0]
    table = cache.slots // cache.page
    plan = Plan(layout, cache.page, table, pages, compute, pairs, mod, quantised)

    q_pos = cache.lengths_B[:, None] - length + jnp.arange(length, dtype=jnp.int32)
    lower, upper = _seen(mask, q_pos, cache)
    run = _run(lower, upper, cache.page)
    columns = [layout.columns(lower, 0), layout.columns(upper, -1)]
    scalars, real, looked_up = [], [], []
    if mod is not None:
        numbers, looked_up = crossing.crossing(
            plan.split, score_mod, layout.columns(q_pos, 0), layout.head_numbers()
        )
        for x in numbers:
            (scalars if x.ndim == 0 else real if is_floating(x) else columns).append(x)
    q = [(q_BLHK.astype(jnp.float32) * scale).astype(compute)]
    tables = []
    if rotation is not None:
        back = jnp.broadcast_to(-run.first[:, None] * cache.page, q_pos.shape)
        unscaled = Rotation(rotation.inv_freq_R)
        turned = unscaled(q[0].astype(jnp.float32), back)
        q = [turned, swapped(turned, pairs)]
        tables = [
            turns(rotation, jnp.arange(tokens), size, layout.together),
            turns(unscaled, jnp.array([tokens]), size, layout.together),
        ]
    known = [_stacked(columns, jnp.int32)]
    known += [_stacked(x, jnp.float32) for x in (real, looked_up) if x]
    out, lse = _call(
        plan,
        run,
        cache,
        scalars,
        [layout.spread(x) for x in q],
        known,
        tables,
        out_dtype(q_BLHK, cache),
        mask,
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
    q: list[Array],
    known: list[Array],
    tables: list[Array],
    dtype: jnp.dtype,
    mask: Mask,
) -> tuple[Array, Array]:
    """Outputs `[B, groups, rows, W]` and log-sums `[B, groups, rows, 1]`."""
    batch, groups, rows, width = q[0].shape
    steps = jnp.maximum(1, pl.cdiv((run.last - run.first + 1).max(), plan.pages))
    prefetched = [run.first, run.last, _order(plan, run, cache.pages_BN).reshape(-1)]
    if plan.mod is not None:
        prefetched += [crossing.packed(scalars, floating) for floating in (False, True)]
    of_row = lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda b, s, *_: (b, 0, 0, 0))  # noqa: E731
    of_all = lambda x: pl.BlockSpec(x.shape, lambda b, s, *_: (0,) * x.ndim)  # noqa: E731
    paged = [cache.k_PTM, cache.v_PTM]
    paged += [cache.k_scale_PGT, cache.v_scale_PGT] if plan.quantised else []
    fixed = [*q, *known]
    out = (
        jax.ShapeDtypeStruct((batch, groups, rows, width), dtype),
        jax.ShapeDtypeStruct((batch, groups, rows, 1), jnp.float32),
    )
    turning = [pltpu.VMEM(x.shape[1:], jnp.float32) for x in q if tables]
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
                pltpu.VMEM((rows, plan.tokens), jnp.float32),
                *turning,
            ],
        ),
        out_shape=out,
        compiler_params=parameters(1, 1),
        cost_estimate=_cost(plan, cache, mask, (*fixed, *out)),
        interpret=interpret,
        name="attention_decode",
    )(*prefetched, *fixed, *tables, *[x for x in paged for _ in range(plan.pages)])


def _order(plan: Plan, run: Run, table_BN: Array) -> Array:
    """The page that each operand of each step reads, int32 `[B, steps x pages]`.

    Past the end of the run an operand stays at the page it has, so nothing is read.
    """
    pages, count = plan.pages, (run.last - run.first + 1)[:, None]
    at = jnp.arange(plan.most_steps * pages, dtype=jnp.int32)
    operand = at % pages
    kept = jnp.minimum(at, operand + (count - 1 - operand) // pages * pages)
    page = jnp.take_along_axis(table_BN, (run.first[:, None] + kept) % plan.table, axis=1)
    return jnp.where((kept >= 0) & (page >= 0), page, 0)


def _page(plan: Plan, x: Array, n: int) -> pl.BlockSpec:
    """The n-th page of a step."""

    def index(b: Array, s: Array, first: Ref, last: Ref, order: Ref, *_: Ref) -> tuple:
        return order[(b * plan.most_steps + s) * plan.pages + n], 0, 0

    return pl.BlockSpec((None, *x.shape[1:]), index)


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


def _kernel(plan: Plan, first: Ref, last: Ref, order: Ref, *refs: Ref) -> None:
    refs = iter(refs)
    take = lambda count: [next(refs) for _ in range(count)]  # noqa: E731
    rotated, halves = plan.pairs is not None, 1 if plan.pairs is None else 2
    scalars = take(0 if plan.mod is None else 2)
    q, integers = take(halves), next(refs)
    split = plan.split
    real = take(1 if split is not None and crossing.has_real_columns(split) else 0)
    looked_up = take(1 if split is not None and split.lookups else 0)
    turn, step_turn = take(2) if rotated else (None, None)
    k, v = take(plan.pages), take(plan.pages)
    k_scale, v_scale = (take(plan.pages if plan.quantised else 0) for _ in range(2))
    out, lse, top, total, acc, hidden = take(6)
    queries = take(2) if rotated else q
    b, s = pl.program_id(0), pl.program_id(1)
    page = first[b] + s * plan.pages

    @pl.when(s == 0)
    def _():
        top[...] = jnp.full_like(top, FLOOR)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)
        if rotated:
            for held, given in zip(queries, q, strict=True):
                held[...] = given[...]

    def add(group: int, k_pos: Array) -> None:
        lanes = pl.ds(group * plan.layout.width, plan.layout.width)
        keys = _joined(k, lanes)
        keys = [keys] if not rotated else [keys.astype(jnp.float32) * turn[n] for n in range(2)]
        score = sum(
            _dot(x[group].astype(plan.compute), y.astype(plan.compute), 1)
            for x, y in zip(queries, keys, strict=True)
        )
        if k_scale:
            score = score * _per_row(plan, k_scale, group)
        if plan.mod is not None:
            numbers = crossing.given(
                split, scalars, integers[group][:, UPPER + 1 :], [x[group] for x in real]
            )
            score = split([*numbers], [*crossing.tables(split, looked_up, group)], score, k_pos)
        if plan.mod is None:
            score = score + hidden[...]
        else:  # which may be no number where it is not seen
            score = jnp.where(hidden[...] == 0, score, -jnp.inf)
        before = top[group]
        highest = jnp.maximum(before, score.max(-1, keepdims=True))
        weights, fade = jnp.exp(score - _wide(highest, plan.tokens)), jnp.exp(before - highest)
        top[group] = highest
        total[group] = total[group] * fade + _lanes(weights)
        if v_scale:
            weights = weights * _per_row(plan, v_scale, group)
        values = _joined(v, lanes).astype(plan.compute)
        new = _dot(weights.astype(plan.compute), values, 0)
        acc[group] = acc[group] * _wide(fade, plan.layout.width) + new

    @pl.when(page <= last[b])
    def _():
        at = jax.lax.broadcasted_iota(jnp.int32, (1, plan.tokens), 1)
        k_pos = page * plan.page + at
        low, high = (integers[0][:, n : n + 1] for n in (LOWER, UPPER))  # as in every group
        hidden[...] = jnp.where((low <= k_pos) & (k_pos <= high), 0.0, -jnp.inf)
        for group in range(plan.layout.groups):
            add(group, k_pos)
        if rotated:
            cos, sin = step_turn[0], step_turn[1]
            one, other = queries[0][...], queries[1][...]
            queries[0][...] = one * cos + other * sin
            queries[1][...] = other * cos - one * sin

    @pl.when(s == pl.num_programs(1) - 1)
    def _():
        weight = total[...].sum(-1, keepdims=True)
        some = weight > 0
        out[...] = (acc[...] * jnp.where(some, 1 / weight, 0.0)).astype(out.dtype)
        lse[...] = jnp.where(some, top[...][:, :, :1] + jnp.log(weight), -jnp.inf)


def _joined(pages: Sequence[Ref], lanes: pl.Slice) -> Array:
    """Some lanes of all pages of a step, one page below the other."""
    return jnp.concatenate([page[:, lanes] for page in pages])


def _wide(x: Array, columns: int) -> Array:
    """A value repeated along lanes, for so many columns."""
    return jnp.tile(x, (1, pl.cdiv(columns, LANES)))[:, :columns]


def _lanes(x: Array) -> Array:
    """Sums over columns of equal lane."""
    pieces = [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)]
    rest = LANES - pieces[-1].shape[1]
    if rest:
        pieces[-1] = jnp.concatenate([pieces[-1], jnp.zeros((x.shape[0], rest))], 1)
    return sum(pieces)


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
