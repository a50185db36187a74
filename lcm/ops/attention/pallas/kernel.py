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
from lcm.ops.attention.pallas.plan import LANES, Plan, counts
from lcm.ops.attention.pallas.tiles import POSITION, SEGMENT
from lcm.types import Array

LN2 = 0.6931471805599453
LOG2E = 1 / LN2
NEVER = 1 << 30  # no block has this number
FLOOR = -1e30  # below every score, above the -inf of a hidden one: where row maxima start

Ref = Any


@dataclasses.dataclass(frozen=True)
class Runs:
    """The table of `tiles` for blocks numbered `blocks` a row, in scalar memory."""

    batch: int
    blocks: int

    def read(self, table: Ref, field: int, b: Array, i: Array) -> Array:
        return table[(field * self.batch + b) * self.blocks + i]

    def at(self, table: Ref, b: Array, i: Array, t: Array) -> Array:
        """The block on the other side at step t of block i."""
        return self.read(table, 0, b, i) + t

    def loaded(self, table: Ref, b: Array, i: Array, t: Array, *parts: int) -> Array:
        """The block in memory at step t: the next one that any of some parts may see, or the last.

        So a block that no part sees is never loaded, not even between the runs of two parts.
        """
        at, block = self.at(table, b, i, t), None
        for n in parts:
            first, last = (self.read(table, 1 + 4 * n + end, b, i) for end in (0, 1))
            own = jnp.where(at <= last, jnp.maximum(at, first), NEVER)
            block = own if block is None else jnp.minimum(block, own)
        last = [self.read(table, 2 + 4 * n, b, i) for n in parts]
        return jnp.where(block < NEVER, block, jnp.maximum(functools.reduce(jnp.maximum, last), 0))

    def kind(self, table: Ref, part: int, b: Array, i: Array, j: Array) -> tuple[Array, Array]:
        """Whether a tile of a part is to be masked, and whether it is visible throughout."""
        first, last, start, stop = (self.read(table, 1 + 4 * part + n, b, i) for n in range(4))
        plain = (start <= j) & (j <= stop)
        return (first <= j) & (j <= last) & ~plain, plain


@dataclasses.dataclass(frozen=True)
class QueryGrid:
    """Blocks of arrays on a grid of (batch, query head, block of queries, step)."""

    plan: Plan
    runs: Runs
    size: int

    def queries(self) -> pl.BlockSpec:
        shape = None, None, self.plan.queries, self.size
        return pl.BlockSpec(shape, lambda b, h, i, t, *_: (b, h, i, 0))

    def keys(self, *parts: int) -> pl.BlockSpec:
        """Keys of a part, or values of all."""

        def index(b: Array, h: Array, i: Array, t: Array, table: Ref, *_: Ref) -> tuple:
            group = jax.lax.div(h, self.plan.shared)
            return b, group, self.runs.loaded(table, b, i, t, *parts), 0

        return pl.BlockSpec((None, None, self.plan.keys, self.size), index)

    def statistic(self) -> pl.BlockSpec:
        """One number per query, `[B, H, 1, L]`."""
        shape = None, None, 1, self.plan.queries
        return pl.BlockSpec(shape, lambda b, h, i, t, *_: (b, h, 0, i))

    def tables(self) -> pl.BlockSpec:
        """A head's row of the tables of score modifications."""
        return pl.BlockSpec((None, 1, self.plan.lanes), lambda b, h, *_: (h, 0, 0))

    def q_info(self, rows: int) -> pl.BlockSpec:
        shape = None, rows, self.plan.queries
        return pl.BlockSpec(shape, lambda b, h, i, t, *_: (b, 0, i))

    def k_info(self, rows: int) -> pl.BlockSpec:
        def index(b: Array, h: Array, i: Array, t: Array, table: Ref, *_: Ref) -> tuple:
            return b, 0, self.runs.loaded(table, b, i, t, *self.plan.parts)

        return pl.BlockSpec((None, rows, self.plan.keys), index)


@dataclasses.dataclass(frozen=True)
class KeyGrid:
    """Blocks on a grid of (batch, key head, block of keys, query head of it, step)."""

    plan: Plan
    runs: Runs
    size: int

    def queries(self, *parts: int) -> pl.BlockSpec:
        """Queries of a part, or gradients of the output for all."""

        def index(b: Array, g: Array, j: Array, r: Array, t: Array, table: Ref, *_: Ref) -> tuple:
            return b, g * self.plan.shared + r, self.runs.loaded(table, b, j, t, *parts), 0

        return pl.BlockSpec((None, None, self.plan.queries, self.size), index)

    def keys(self) -> pl.BlockSpec:
        shape = None, None, self.plan.keys, self.size
        return pl.BlockSpec(shape, lambda b, g, j, r, t, *_: (b, g, j, 0))

    def statistic(self) -> pl.BlockSpec:
        """One number per query, `[B, H, 1, L]`."""

        def index(b: Array, g: Array, j: Array, r: Array, t: Array, table: Ref, *_: Ref) -> tuple:
            return (
                b,
                g * self.plan.shared + r,
                0,
                self.runs.loaded(table, b, j, t, *self.plan.parts),
            )

        return pl.BlockSpec((None, None, 1, self.plan.queries), index)

    def q_info(self, rows: int) -> pl.BlockSpec:
        def index(b: Array, g: Array, j: Array, r: Array, t: Array, table: Ref, *_: Ref) -> tuple:
            return b, 0, self.runs.loaded(table, b, j, t, *self.plan.parts)

        return pl.BlockSpec((None, rows, self.plan.queries), index)

    def tables(self) -> pl.BlockSpec:
        """A query head's row of the tables of score modifications."""

        def index(b: Array, g: Array, j: Array, r: Array, *_: Ref) -> tuple:
            return g * self.plan.shared + r, 0, 0

        return pl.BlockSpec((None, 1, self.plan.lanes), index)

    def k_info(self, rows: int) -> pl.BlockSpec:
        shape = None, rows, self.plan.keys
        return pl.BlockSpec(shape, lambda b, g, j, r, t, *_: (b, 0, j))


def each_part(
    plan: Plan, runs: Runs, table: Ref, at: tuple, body: Callable[[int, bool], None]
) -> None:
    """`body(part, masked)` for the parts that see something of the tile at (b, i, j)."""
    for n in plan.parts:
        masked, plain = runs.kind(table, n, *at)
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


def visible(plan: Plan, n: int, q: Callable[[int], Array], k: Callable[[int], Array]) -> Array:
    """Places of a tile that part n sees; q and k give a row of what is known, as they broadcast."""
    seen = q(SEGMENT) == k(SEGMENT)
    lower, upper = plan.rows[n]
    seen = seen if lower is None else seen & (q(lower) <= k(POSITION))
    return seen if upper is None else seen & (k(POSITION) <= q(upper))


def wide(x: Array, columns: int) -> Array:
    """A value repeated along lanes, for so many columns."""
    return jnp.tile(x, (1, pl.cdiv(columns, LANES)))[:, :columns]


def dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Matmul over one axis of each, summed in float32."""
    return jax.lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32
    )
