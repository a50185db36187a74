"""What the kernels know before tracing: masks, block sizes, and the work they amount to."""

import dataclasses
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl

from lcm.ops.attention.modification import Modification, is_floating
from lcm.ops.attention.pallas.maps import Form
from lcm.ops.attention.pallas.visits import Room
from lcm.ops.attention.pallas.walk import Runs, Visits, Walk
from lcm.ops.tpu import LANES

LARGEST = 1024, 1024  # queries and keys of a tile, if its arrays leave room in vector memory
interpret = False  # run kernels as plain JAX, for tests on a machine without a TPU


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts about one call; `rows[n]` says where the interval of part n stands."""

    heads: int
    kv_heads: int
    queries: int  # rows of a tile
    keys: int  # columns of a tile
    rows: tuple[tuple[int | None, int | None], ...]
    mods: tuple[Modification | None, ...]
    maps: tuple[Form | None, ...]
    room: Room | None  # for lists of tiles, where a part has a map
    pairs: int  # of a query and a key, in the tiles inside the band
    interpret: bool

    @property
    def parts(self) -> range:
        """Numbers of the parts."""
        return range(len(self.rows))

    @property
    def shared(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    def walk(self, batch: int, blocks: int, *, of_keys: bool) -> Walk:
        """How a kernel goes over tiles whose results belong to so many blocks."""
        if self.room is None:
            return Runs(batch, blocks)
        if of_keys:
            return Visits(batch, self.room.key_heads, self.room.by_key)
        return Visits(batch, self.room.heads, self.room.by_query)

    def lists(self, n: int) -> int:
        """Which of the lists of maps is part n's."""
        return sum(form is not None for form in self.maps[:n])

    def slots(self, n: int) -> tuple[int, int, int]:
        """Where part n's integers, floats and lanes of tables start among those of all parts."""
        before = [counts(mod) for mod in self.mods[:n] if mod is not None]
        return (
            sum(i for i, _, _ in before),
            sum(f for _, f, _ in before),
            sum(x for _, _, x in before),
        )

    @property
    def floats(self) -> int:
        """Floats of all score modifications; one that nobody reads where there are none."""
        return max(1, self.slots(len(self.mods))[1])

    @property
    def lanes(self) -> int:
        """Lanes of the tables of all score modifications; as many of zeros where there are none."""
        return max(LANES, self.slots(len(self.mods))[2])


def counts(mod: Modification) -> tuple[int, int, int]:
    """How many integers, floats and lanes of tables enter a kernel."""
    split = mod.for_head((8, 1), (1, LANES))
    floats = sum(is_floating(number) for number in split.numbers)
    return len(split.numbers) - floats, floats, sum(split.lanes)


def block(length: int, largest: int) -> int:
    """The size of equal blocks of at most `largest`, in whole lanes, that pad a length least."""
    count = math.ceil(length / largest)
    return math.ceil(length / count / LANES) * LANES


def largest(size: int, dtype: jnp.dtype) -> tuple[int, int]:
    """Queries and keys of the largest tile: 1024 in two bytes up to head size 128, else 512.

    By the schedules 1024 x 1024 has the fewest bundles a pair in each of the three kernels on each
    generation, so there is one choice (figures in tests/benchmarks/attention_kernels.py).
    """
    small = jnp.dtype(dtype).itemsize <= 2 and size <= 128
    return LARGEST if small else tuple(min(side, 512) for side in LARGEST)


def cost(plan: Plan, inputs: tuple, outputs: tuple, matmuls: int) -> pl.CostEstimate:
    """Work of a kernel that computes every pair inside the band: what is known before it runs.

    FLOPs are 2 K for a pair and matmul, with one exponential a pair and part; bytes count every
    array once, and keys and values once for each block of queries that reads them.
    """
    batch, heads, _, size = inputs[0].shape
    pairs = batch * heads * plan.pairs * len(plan.rows)
    once = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in (*inputs, *outputs))
    again = pairs // plan.queries * size * jnp.dtype(inputs[0].dtype).itemsize
    return pl.CostEstimate(
        flops=2 * size * matmuls * pairs, bytes_accessed=once + again, transcendentals=pairs
    )
