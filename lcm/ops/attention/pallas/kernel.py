"""What the three kernels share: reading the table of tiles, scores of a tile, and index maps."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lcm.ops.attention.modification import Modification, is_floating
from lcm.ops.attention.pallas.plan import Plan, counts
from lcm.ops.attention.pallas.tiles import POSITION, SEGMENT
from lcm.ops.attention.pallas.walk import Step, Walk
from lcm.ops.tpu import LANES
from lcm.types import Array

LN2 = 0.6931471805599453
LOG2E = 1 / LN2
FLOOR = -1e30  # below every score, above the -inf of a hidden one: where row maxima start

Ref = Any


@dataclasses.dataclass(frozen=True)
class QueryGrid:
    """Blocks of arrays on a grid of (batch, query head, block of queries, step)."""

    plan: Plan
    walk: Walk
    size: int

    def step(self, b: Array, h: Array, i: Array, t: Array) -> Step:
        return Step(b, h, i, 0, t)

    def at(self, index: Callable[[Ref, Step], tuple]) -> Callable:
        """An index map, given the table."""
        return lambda b, h, i, t, table, *_: index(table, self.step(b, h, i, t))

    def queries(self) -> pl.BlockSpec:
        index = self.at(lambda table, s: (s.b, s.head, self.walk.own(table, s), 0))
        return pl.BlockSpec((None, None, self.plan.queries, self.size), index)

    def keys(self, *parts: int) -> pl.BlockSpec:
        """Keys of a part, or values of all."""

        def index(table: Ref, s: Step) -> tuple:
            group = jax.lax.div(s.head, self.plan.shared)
            return s.b, group, self.walk.loaded(table, s, *parts), 0

        return pl.BlockSpec((None, None, self.plan.keys, self.size), self.at(index))

    def statistic(self) -> pl.BlockSpec:
        """One number per query, `[B, H, 1, L]`."""
        index = self.at(lambda table, s: (s.b, s.head, 0, self.walk.own(table, s)))
        return pl.BlockSpec((None, None, 1, self.plan.queries), index)

    def tables(self) -> pl.BlockSpec:
        """A head's row of the tables of score modifications."""
        return pl.BlockSpec((None, 1, self.plan.lanes), lambda b, h, *_: (h, 0, 0))

    def lists(self, listed: Array) -> pl.BlockSpec:
        """Rows of a block map, `[H or 1, N, L]`."""
        heads, rows, _ = listed.shape
        index = self.at(lambda table, s: (s.head if heads > 1 else 0, 0, self.walk.own(table, s)))
        return pl.BlockSpec((None, rows, self.plan.queries), index)

    def q_info(self, rows: int) -> pl.BlockSpec:
        index = self.at(lambda table, s: (s.b, 0, self.walk.own(table, s)))
        return pl.BlockSpec((None, rows, self.plan.queries), index)

    def k_info(self, rows: int) -> pl.BlockSpec:
        index = self.at(lambda table, s: (s.b, 0, self.walk.loaded(table, s, *self.plan.parts)))
        return pl.BlockSpec((None, rows, self.plan.keys), index)


@dataclasses.dataclass(frozen=True)
class KeyGrid:
    """Blocks on a grid of (batch, key head, block of keys, query head of it, step)."""

    plan: Plan
    walk: Walk
    size: int

    def step(self, b: Array, g: Array, j: Array, r: Array, t: Array) -> Step:
        return Step(b, g, j, r, t)

    def at(self, index: Callable[[Ref, Step], tuple]) -> Callable:
        """An index map, given the table."""
        return lambda b, g, j, r, t, table, *_: index(table, self.step(b, g, j, r, t))

    def head(self, table: Ref, s: Step) -> Array:
        """The query head."""
        return s.head * self.plan.shared + self.walk.shared(table, s)

    def loaded(self, table: Ref, s: Step) -> Array:
        return self.walk.loaded(table, s, *self.plan.parts)

    def queries(self, *parts: int) -> pl.BlockSpec:
        """Queries of a part, or gradients of the output for all."""

        def index(table: Ref, s: Step) -> tuple:
            return s.b, self.head(table, s), self.walk.loaded(table, s, *parts), 0

        return pl.BlockSpec((None, None, self.plan.queries, self.size), self.at(index))

    def keys(self) -> pl.BlockSpec:
        index = self.at(lambda table, s: (s.b, s.head, self.walk.own(table, s), 0))
        return pl.BlockSpec((None, None, self.plan.keys, self.size), index)

    def statistic(self) -> pl.BlockSpec:
        """One number per query, `[B, H, 1, L]`."""
        index = self.at(lambda table, s: (s.b, self.head(table, s), 0, self.loaded(table, s)))
        return pl.BlockSpec((None, None, 1, self.plan.queries), index)

    def tables(self) -> pl.BlockSpec:
        """A query head's row of the tables of score modifications."""
        index = self.at(lambda table, s: (self.head(table, s), 0, 0))
        return pl.BlockSpec((None, 1, self.plan.lanes), index)

    def lists(self, listed: Array) -> pl.BlockSpec:
        """Rows of a block map, `[H or 1, N, L]`."""
        heads, rows, _ = listed.shape

        def index(table: Ref, s: Step) -> tuple:
            return self.head(table, s) if heads > 1 else 0, 0, self.loaded(table, s)

        return pl.BlockSpec((None, rows, self.plan.queries), self.at(index))

    def q_info(self, rows: int) -> pl.BlockSpec:
        index = self.at(lambda table, s: (s.b, 0, self.loaded(table, s)))
        return pl.BlockSpec((None, rows, self.plan.queries), index)

    def k_info(self, rows: int) -> pl.BlockSpec:
        index = self.at(lambda table, s: (s.b, 0, self.walk.own(table, s)))
        return pl.BlockSpec((None, rows, self.plan.keys), index)


def each_part(
    plan: Plan, walk: Walk, table: Ref, step: Step, body: Callable[[int, bool], None]
) -> None:
    """`body(part, masked)` for the parts that see something of a step's tile."""
    for n in plan.parts:
        masked, plain = walk.kind(table, n, step)
        pl.when(plain)(functools.partial(body, n, False))
        pl.when(masked)(functools.partial(body, n, True))


class Own(NamedTuple):
    """What one head's modification of one part works with: floats and tables have gradients."""

    integers: tuple[Array, ...]
    floats: tuple[Array, ...]
    tables: tuple[Array, ...]


def own(plan: Plan, n: int, integers: Ref, floats: Ref, tables: Ref, head: Array) -> Own:
    """Of part n, which has a modification: numbers of scalar memory, tables of the head's row."""
    (i, f, at), (whole, real, _) = plan.slots(n), counts(plan.mods[n])
    widths = plan.mods[n].for_head((8, 1), (1, LANES)).lanes
    starts = itertools.accumulate(widths, initial=at)
    return Own(
        tuple(integers[(i + m) * plan.heads + head] for m in range(whole)),
        tuple(floats[(f + m) * plan.heads + head] for m in range(real)),
        tuple(tables[:, at : at + width] for at, width in zip(starts, widths, strict=False)),
    )


def modified(mod: Modification, raw: Array, q_pos: Array, k_pos: Array, own: Own) -> Array:
    """The scores of a tile after a modification, either way round."""
    split = mod.for_head(q_pos.shape, k_pos.shape)
    integers, floats = iter(own.integers), iter(own.floats)
    numbers = [next(floats if is_floating(x) else integers) for x in split.numbers]
    return split(numbers, own.tables, q_pos, raw, k_pos)


def scores(score: Array, modified: bool, seen: Array | None) -> Array:
    """To base 2, -inf where hidden; unless modified, queries carry the factor already."""
    score = score * LOG2E if modified else score
    return score if seen is None else jnp.where(seen, score, -jnp.inf)


def visible(
    plan: Plan,
    n: int,
    q: Callable[[int], Array],
    k: Callable[[int], Array],
    word: Array | None,
    first: Array | None,
) -> Array:
    """Places of a tile that part n sees; q and k give a row of what is known, as they broadcast.

    With a map, from `word` of each query whose bits are blocks of keys, `first` and on.
    """
    seen = q(SEGMENT) == k(SEGMENT)
    lower, upper = plan.rows[n]
    seen = seen if lower is None else seen & (q(lower) <= k(POSITION))
    seen = seen if upper is None else seen & (k(POSITION) <= q(upper))
    if word is None:
        return seen
    return seen & (
        (jax.lax.shift_right_logical(*_tile(word, k(plan.maps[n].row) - first)) & 1) != 0
    )


def _tile(*xs: Array) -> list[Array]:
    """Rows and columns as the tiles they span."""
    shape = jnp.broadcast_shapes(*(x.shape for x in xs))
    return [jnp.broadcast_to(x, shape) for x in xs]


def first_block(plan: Plan, n: int, k_block: Array) -> Array:
    """The first block of part n's map in a block of keys."""
    return jax.lax.div(k_block * plan.keys, plan.maps[n].size)


def wide(x: Array, columns: int) -> Array:
    """A value repeated along lanes, for so many columns."""
    return jnp.tile(x, (1, pl.cdiv(columns, LANES)))[:, :columns]


def column(row: Array, lanes: int = LANES) -> Array:
    """A row `[1, Q]` as columns that are all the same."""
    return jnp.broadcast_to(row, (lanes, row.shape[1])).T


def dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Matmul over one axis of each, summed in float32."""
    return jax.lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32
    )
