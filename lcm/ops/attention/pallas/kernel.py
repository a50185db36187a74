"""What the three kernels share: reading the table of tiles, scores of a tile, and index maps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lcm.ops.attention.pallas.plan import Plan
from lcm.ops.attention.pallas.tiles import POSITION, SEGMENT
from lcm.types import Array

LN2 = 0.6931471805599453
LOG2E = 1 / LN2
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

    def loaded(self, table: Ref, b: Array, i: Array, t: Array, part: int | None = None) -> Array:
        """The block in memory at step t: of a part, or for all parts; no step loads it in vain."""
        field = 0 if part is None else 2 + 4 * part
        first, last = (self.read(table, field + end, b, i) for end in (0, 1))
        return jnp.maximum(jnp.minimum(self.at(table, b, i, t), last), first)

    def kind(self, table: Ref, part: int, b: Array, i: Array, j: Array) -> tuple[Array, Array]:
        """Whether a tile of a part is to be masked, and whether it is visible throughout."""
        first, last, start, stop = (self.read(table, 2 + 4 * part + n, b, i) for n in range(4))
        plain = (start <= j) & (j <= stop)
        return (first <= j) & (j <= last) & ~plain, plain


def each_part(
    plan: Plan, runs: Runs, table: Ref, at: tuple, body: Callable[[int, bool], None]
) -> None:
    """`body(part, masked)` for the parts that see something of the tile at (b, i, j)."""
    for n in range(len(plan.rows)):
        masked, plain = runs.kind(table, n, *at)
        pl.when(plain)(functools.partial(body, n, False))
        pl.when(masked)(functools.partial(body, n, True))


def numbers(plan: Plan, n: int, integers: Ref, floats: Ref, head: Array) -> tuple[tuple, tuple]:
    """The numbers of part n's score modification for a head, out of scalar memory."""
    mod = plan.mods[n]
    if mod is None:
        return (), ()
    i, f = plan.slots(n)
    return (
        tuple(integers[(i + m) * plan.heads + head] for m in range(len(mod.integers))),
        tuple(floats[(f + m) * plan.heads + head] for m in range(len(mod.floats))),
    )


def scores(raw: Array, modify: Callable | None, seen: Array | None) -> Array:
    """Scores to base 2 of a tile; without a modification queries carry the factor already."""
    score = raw if modify is None else modify(raw) * LOG2E
    return score if seen is None else jnp.where(seen, score, -jnp.inf)


def visible(plan: Plan, n: int, q: Callable[[int], Array], k: Callable[[int], Array]) -> Array:
    """Places of a tile that part n sees; q and k give a row of what is known, as they broadcast."""
    seen = q(SEGMENT) == k(SEGMENT)
    lower, upper = plan.rows[n]
    seen = seen if lower is None else seen & (q(lower) <= k(POSITION))
    return seen if upper is None else seen & (k(POSITION) <= q(upper))


def dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Matmul over one axis of each, summed in float32."""
    return jax.lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32
    )
