"""Keys and values of one attention layer between calls: whole rows, or rings with sinks, or pages.

A cache has `append(k, v, context) -> cache` and `view() -> (k_BSGK, v_BSGK, k_context)`. Attention
sees what positions and segments of the view say, never where a token lies, so how a cache places
its tokens is its own affair.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lcm.ops.attention.decode import Cache, append
from lcm.ops.attention.decode.cache import quantised
from lcm.ops.attention.decode.reference import gathered, slot_positions
from lcm.types import Array, Context, Keys, Values

View = tuple[Keys, Values, Context]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rows of S slots, each with the place of its token.

    k, v: `[B, S, G, K]`, keys as the encoding lets them be cached; int8 with `scales` or not.
    positions, segments: int32 `[B, S]`, segment 0 where nothing is written yet.
    used_B: int32, tokens of each row so far; padding (segment 0) takes no slot.
    scales: float32 `[2, B, S, G]` of int8 keys and values, else `None`.
    chunk: 0, or the most tokens of a call to a ring, whose slots past the first `sinks` hold the
        latest tokens.
    """

    k_BSGK: Array
    v_BSGK: Array
    positions_BS: Array
    segments_BS: Array
    used_B: Array
    scales: Array | None = None
    sinks: int = dataclasses.field(default=0, metadata={"static": True})
    chunk: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def slots(self) -> int:
        """S."""
        return self.k_BSGK.shape[-3]

    def append(self, k_BLGK: Keys, v_BLGK: Values, context: Context) -> "KVCache":
        """The cache with the tokens that are no padding behind those it has.

        Tokens that find no slot are dropped; `lcm.apply` refuses them where it can see them.

        Raises:
            ValueError: if a ring is given more tokens than it has been made for.
        """
        length = k_BLGK.shape[1]
        if self.chunk and length > self.chunk:
            raise ValueError(
                f"{length} tokens for a ring that takes {self.chunk} in one call: make the state "
                f"with init_state(..., chunk={length}), or pass fewer at a time"
            )
        real_BL = context.segments_BL > 0
        number_BL = self.used_B[:, None] + jnp.cumsum(real_BL, 1) - 1
        slot_BL = number_BL
        if self.chunk:
            turned = self.sinks + (number_BL - self.sinks) % (self.slots - self.sinks)
            slot_BL = jnp.where(number_BL < self.sinks, number_BL, turned)
        slot_BL = jnp.where(real_BL, slot_BL, self.slots)  # beyond the end: dropped
        row_B1 = jnp.arange(len(self.used_B))[:, None]

        def put(slots: Array, new: Array) -> Array:
            return slots.at[row_B1, slot_BL].set(new.astype(slots.dtype), mode="drop")

        scales = self.scales
        if scales is not None:
            (k_BLGK, k_scale), (v_BLGK, v_scale) = quantised(k_BLGK), quantised(v_BLGK)
            scales = jnp.stack([put(scales[0], k_scale), put(scales[1], v_scale)])
        return dataclasses.replace(
            self,
            k_BSGK=put(self.k_BSGK, k_BLGK),
            v_BSGK=put(self.v_BSGK, v_BLGK),
            positions_BS=put(self.positions_BS, context.positions_BL),
            segments_BS=put(self.segments_BS, context.segments_BL),
            used_B=self.used_B + real_BL.sum(1, dtype=jnp.int32),
            scales=scales,
        )

    def view(self) -> View:
        """What attention sees: all slots, int8 ones as float32."""
        context = _context(self.positions_BS, self.segments_BS)
        if self.scales is None:
            return self.k_BSGK, self.v_BSGK, context
        k, v = (
            x.astype(jnp.float32) * scale[..., None]
            for x, scale in zip((self.k_BSGK, self.v_BSGK), self.scales, strict=True)
        )
        return k, v, context

    def longer(self, slots: int) -> "KVCache":
        """The cache with more slots a row; a ring stays as it is."""
        missing = slots - self.slots
        if self.chunk or missing <= 0:
            return self

        def padded(x: Array, axis: int) -> Array:
            return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)])

        own = {
            name: padded(getattr(self, name), 1)
            for name in ("k_BSGK", "v_BSGK", "positions_BS", "segments_BS")
        }
        scales = None if self.scales is None else padded(self.scales, 2)
        return dataclasses.replace(self, **own, scales=scales)

    def rows(self, row_R: Array) -> "KVCache":
        """Some rows, in any order, any of them more than once."""
        own = jax.tree.map(lambda x: x[row_R], dataclasses.replace(self, scales=None))
        scales = None if self.scales is None else self.scales[:, row_R]
        return dataclasses.replace(own, scales=scales)

    def insert(self, row: Array | int, one: "KVCache", source: Array | int = 0) -> "KVCache":
        """The cache with a row of another one, of no more slots, in the place of its own."""

        def put(mine: Array, other: Array) -> Array:
            return mine.at[row, : other.shape[1]].set(other[source]) if other.ndim > 1 else (
                mine.at[row].set(other[source])
            )

        own = {
            name: put(getattr(self, name), getattr(one, name))
            for name in ("k_BSGK", "v_BSGK", "used_B", "positions_BS")
        }
        # What lies behind the new row's end is of the old one: nothing is there.
        cleared = self.segments_BS.at[row].set(0)
        scales = self.scales
        if scales is not None:
            scales = jnp.stack([put(mine, other) for mine, other in zip(scales, one.scales)])
        return dataclasses.replace(
            self, **own, segments_BS=put(cleared, one.segments_BS), scales=scales
        )


def contiguous(
    batch: int, slots: int, heads: int, size: int, dtype: jnp.dtype, sinks: int = 0, chunk: int = 0
) -> KVCache:
    """An empty cache; with `chunk` a ring of `slots` slots, `sinks` of them for the first."""
    shape = (batch, slots, heads, size)

    def places() -> Array:  # an array each, so that a program may be given both to overwrite
        return jnp.zeros((batch, slots), jnp.int32)

    scales = jnp.zeros((2, *shape[:3])) if jnp.dtype(dtype) == jnp.int8 else None
    k, v, used_B = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32)
    return KVCache(k, v, places(), places(), used_B, scales, sinks, chunk)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Rows in pages of a common pool (arXiv:2309.06180): one document a row, positions from 0.

    Who owns which page is decided outside, see lcm.decoding.pages; a row that is not there has
    length 0 and a table of -1.
    """

    cache: Cache

    @property
    def slots(self) -> int:
        """Tokens that the table has room for in a row."""
        return self.cache.slots

    def append(self, k_BLGK: Keys, v_BLGK: Values, context: Context) -> "PagedKVCache":
        """The cache with the tokens of each row, padding at the end of a row left out."""
        counts_B = (context.segments_BL > 0).sum(1, dtype=jnp.int32)
        return PagedKVCache(append(self.cache, k_BLGK, v_BLGK, counts_B))

    def view(self) -> View:
        """The pages of each row gathered into one piece; the kernel for TPUs reads them in place."""
        cache = self.cache
        k_BSGK = gathered(cache, cache.k_PTM, cache.k_scale_PGT)
        v_BSGK = gathered(cache, cache.v_PTM, cache.v_scale_PGT)
        positions_BS = slot_positions(cache.lengths_B, cache.slots)
        return k_BSGK, v_BSGK, _context(positions_BS, (positions_BS >= 0).astype(jnp.int32))


def _context(positions_BS: Array, segments_BS: Array) -> Context:
    return Context(positions_BS, segments_BS, jnp.full_like(positions_BS, -1))
