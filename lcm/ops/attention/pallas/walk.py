"""How a kernel's grid walks over tiles, read from prefetched numbers in scalar memory.

A step of a grid is `(b, head, own, shared, t)`: a row of the batch, a head, a block of the side
that results belong to, a query head of those that share a key head, and a step on the other side.
The kernel of queries has query heads and 0 for `shared`, that of keys has key heads.

`Runs` takes each block's other side from its first live tile to its last (`tiles.tiles`). `Visits`
has a list of tiles, block after block, and walks down it in `t` alone (`tiles.visits`).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcm.types import Array

NEVER = 1 << 30  # no block has this number

Ref = Any


class Step(NamedTuple):
    b: Array
    head: Array
    own: Array
    shared: Array | int
    t: Array


@dataclasses.dataclass(frozen=True)
class Runs:
    """Tables of `tiles.tiles` for blocks numbered `blocks` a row."""

    batch: int
    blocks: int

    def grid(self, shared: int, steps: Array) -> tuple[int, int, Array]:
        """Sizes of the axes of `own`, `shared` and `t`."""
        return self.blocks, shared, steps

    def own(self, table: Ref, step: Step) -> Array:
        return step.own

    def shared(self, table: Ref, step: Step) -> Array | int:
        return step.shared

    def ends(self, table: Ref, step: Step, shared: int, steps: Array) -> tuple[Array, Array]:
        """Whether this is the first step of its own block, and whether the last."""
        last = (step.shared == shared - 1) & (step.t == steps - 1)
        return (step.shared == 0) & (step.t == 0), last

    def read(self, table: Ref, field: int, step: Step) -> Array:
        return table[(field * self.batch + step.b) * self.blocks + step.own]

    def other(self, table: Ref, step: Step) -> Array:
        """The block on the other side."""
        return self.read(table, 0, step) + step.t

    def loaded(self, table: Ref, step: Step, *parts: int) -> Array:
        """The block in memory: the next one that any of some parts may see, or the last.

        So a block that no part sees is never loaded, not even between the runs of two parts.
        """
        at, block = self.other(table, step), None
        for n in parts:
            first, last = (self.read(table, 1 + 4 * n + end, step) for end in (0, 1))
            own = jnp.where(at <= last, jnp.maximum(at, first), NEVER)
            block = own if block is None else jnp.minimum(block, own)
        last = [self.read(table, 2 + 4 * n, step) for n in parts]
        return jnp.where(block < NEVER, block, jnp.maximum(functools.reduce(jnp.maximum, last), 0))

    def kind(self, table: Ref, part: int, step: Step) -> tuple[Array, Array]:
        """Whether a tile of a part is to be masked, and whether it is visible throughout."""
        first, last, start, stop = (self.read(table, 1 + 4 * part + n, step) for n in range(4))
        j = self.other(table, step)
        plain = (start <= j) & (j <= stop)
        return (first <= j) & (j <= last) & ~plain, plain


@dataclasses.dataclass(frozen=True)
class Visits:
    """Tables of `tiles.visits`: two words a tile, lists of `length` for each row and head."""

    batch: int
    heads: int  # 1 for one list for all
    length: int

    def grid(self, shared: int, steps: Array) -> tuple[int, int, Array]:
        """Sizes of the axes of `own`, `shared` and `t`: the list has blocks and shared heads."""
        return 1, 1, steps

    def word(self, table: Ref, n: int, step: Step) -> Array:
        head = step.head if self.heads > 1 else 0
        return table[((n * self.batch + step.b) * self.heads + head) * self.length + step.t]

    def own(self, table: Ref, step: Step) -> Array:
        return self.word(table, 0, step) >> 16

    def other(self, table: Ref, step: Step) -> Array:
        """The block on the other side."""
        return self.word(table, 0, step) & 0xFFFF

    def loaded(self, table: Ref, step: Step, *parts: int) -> Array:
        """The block in memory, which some part sees."""
        return self.other(table, step)

    def shared(self, table: Ref, step: Step) -> Array:
        return self.word(table, 1, step) >> SHARED

    def ends(self, table: Ref, step: Step, shared: int, steps: Array) -> tuple[Array, Array]:
        """Whether this is the first step of its own block, and whether the last."""
        word = self.word(table, 1, step)
        return (word & FIRST) != 0, (word & LAST) != 0

    def kind(self, table: Ref, part: int, step: Step) -> tuple[Array, Array]:
        """Whether a tile of a part is to be masked, and whether it is visible throughout."""
        word = self.word(table, 1, step) >> (KINDS + 2 * part)
        return (word & 1) != 0, (word & 2) != 0


Walk = Runs | Visits

# The second word of a visit: its place in its block's list, two bits for each part, a shared head.
FIRST, LAST, KINDS, SHARED = 1, 2, 2, 20
PARTS = (SHARED - KINDS) // 2  # at most


def word(first: Array, last: Array, kinds: list[tuple[Array, Array]], shared: Array) -> Array:
    """The second word of visits."""
    bits = [(first, 0), (last, 1)]
    for n, (masked, plain) in enumerate(kinds):
        bits += [(masked, KINDS + 2 * n), (plain, KINDS + 2 * n + 1)]
    bits = [jax.lax.shift_left(x.astype(jnp.int32), jnp.int32(at)) for x, at in bits]
    return functools.reduce(jnp.bitwise_or, bits) | (shared << SHARED)
