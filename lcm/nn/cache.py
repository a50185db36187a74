"""Keys and values of one attention layer between calls: whole rows, or rings with sinks, or pages.

A cache has `append(k, v, context) -> cache` and `view() -> (k_BSGK, v_BSGK, k_context)`. Attention
sees what positions and segments of the view say, never where a token lies, so how a cache places
its tokens is its own affair.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from lcm.ops.attention.decode import Cache, append
from lcm.ops.attention.decode.cache import quantised
from lcm.ops.attention.decode.reference import gathered, slot_positions
from lcm.types import Array, Context, Keys, Values

View = tuple[Keys, Values, Context]
Slots = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rows of S slots, each with the place of its token.

    k, v: `[B, G, S, K]`, as attention multiplies them; keys as the encoding lets them be cached.
        The size of v may be one of its own: latent attention keeps two other things here.
    k_scale, v_scale: float32 `[B, G, S]` of int8 keys and values, else `None`.
    positions, segments: int32 `[B, S]`, segment 0 where nothing is written yet.
    used_B: int32, tokens of each row so far; padding (segment 0) takes no slot.
    sinks, chunk: of a ring, whose slots past the first `sinks` hold the latest tokens, and which
        takes at most `chunk` tokens a call; 0 elsewhere.
    """

    k_BGSK: Array
    v_BGSK: Array
    k_scale_BGS: Array | None
    v_scale_BGS: Array | None
    positions_BS: Array
    segments_BS: Array
    used_B: Array
    sinks: int = dataclasses.field(default=0, metadata={"static": True})
    chunk: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def slots(self) -> int:
        """S."""
        return self.k_BGSK.shape[-2]

    def append(self, k_BLGK: Keys, v_BLGK: Values, context: Context) -> Self:
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
        new = {"positions_BS": context.positions_BL, "segments_BS": context.segments_BL}
        for name, x_BLGK in (("k", k_BLGK), ("v", v_BLGK)):
            scale = None
            if self.k_scale_BGS is not None:
                x_BLGK, scale = quantised(x_BLGK)
            new.update({f"{name}_BGSK": x_BLGK, f"{name}_scale_BGS": scale})
        real_BL = context.segments_BL > 0
        rows_B1, slot_BL = jnp.arange(len(self.used_B))[:, None], self._slots(real_BL)
        if slot_BL.size == 1:  # one more that is dropped: XLA copies the cache to write one place
            new = {name: _with_padding(x) for name, x in new.items()}
            slot_BL = jnp.pad(slot_BL, ((0, 0), (0, 1)), constant_values=self.slots)
        written = self._written(rows_B1, slot_BL, new)
        used_B = self.used_B + real_BL.sum(1, dtype=jnp.int32)
        return dataclasses.replace(self, **written, used_B=used_B)

    def _slots(self, real_BL: Array) -> Array:
        """Slots of the next tokens; that beyond the last one, where nothing can be written, of
        padding."""
        number_BL = self.used_B[:, None] + jnp.cumsum(real_BL, 1) - 1
        return jnp.where(real_BL, self._slot(number_BL), self.slots)

    def _slot(self, number: Array) -> Array:
        """The slot of a token by its number in the row."""
        if not self.chunk:
            return number
        turned = self.sinks + (number - self.sinks) % (self.slots - self.sinks)
        return jnp.where(number < self.sinks, number, turned)

    def _written(self, row: Array | int, slot: Array, new: dict[str, Array | None]) -> Slots:
        """What the fields of `new` are once that is written in rows and slots."""

        def put(name: str, x: Array) -> Array:
            old = getattr(self, name)
            return old.at[_index(old, row, slot)].set(x.astype(old.dtype), mode="drop")

        return {name: put(name, x) for name, x in new.items() if x is not None}

    def view(self) -> View:
        """What attention sees: all slots, int8 ones as float32."""
        k_BGSK, v_BGSK = self.k_BGSK, self.v_BGSK
        if self.k_scale_BGS is not None:
            k_BGSK = k_BGSK.astype(jnp.float32) * self.k_scale_BGS[..., None]
            v_BGSK = v_BGSK.astype(jnp.float32) * self.v_scale_BGS[..., None]
        context = _context(self.positions_BS, self.segments_BS)
        return k_BGSK.swapaxes(1, 2), v_BGSK.swapaxes(1, 2), context

    def longer(self, slots: int) -> Self:
        """The cache with so many slots a row, at least; a ring stays as it is."""
        missing = slots - self.slots
        if self.chunk or missing <= 0:
            return self

        def padded(x: Array) -> Array:
            return jnp.pad(x, [(0, missing if axis == _axis(x) else 0) for axis in range(x.ndim)])

        return jax.tree.map(lambda x: x if x is self.used_B else padded(x), self)

    def first(self, count: Array | int) -> Self:
        """The cache with the first `count` tokens of each row alone; a ring cannot go back."""
        there_BS = (jnp.arange(self.slots) < count)[None] & (self.segments_BS > 0)
        return dataclasses.replace(
            self,
            segments_BS=jnp.where(there_BS, self.segments_BS, 0),
            used_B=jnp.minimum(self.used_B, count),
        )

    def rows(self, row_R: Array) -> Self:
        """Some rows, in any order, any of them more than once."""
        return jax.tree.map(lambda x: x[row_R], self)

    def insert(self, row: Array | int, one: Self, start: Array | int, count: Array | int) -> Self:
        """The cache with `count` tokens of the only row of another one in the place of a row.

        There they lie from slot `start` on, as a document of a packed row does. A ring takes
        another of its size as it is, and of a whole row what has room in it.
        """
        at_S = jnp.arange(one.slots)
        if one.chunk:
            from_S, to_S = at_S, at_S
        else:
            from_S = jnp.minimum(start + at_S, one.slots - 1)
            kept_S = (at_S >= count - self.slots + self.sinks) | (at_S < self.sinks)
            to_S = jnp.where((at_S < count) & kept_S, self._slot(at_S), self.slots)
        names = [field.name for field in dataclasses.fields(self) if "S" in field.name]
        new = {name: getattr(one, name) for name in names}
        new = {name: x if x is None else x[_index(x, 0, from_S)] for name, x in new.items()}
        new["segments_BS"] = jnp.minimum(new["segments_BS"], 1)  # one document, whichever it was
        cleared = dataclasses.replace(self, segments_BS=self.segments_BS.at[row].set(0))
        written = cleared._written(row, to_S, new)
        return dataclasses.replace(self, **written, used_B=self.used_B.at[row].set(count))


def _with_padding(x_BLX: Array | None) -> Array | None:
    """One more token of zeros."""
    if x_BLX is None:
        return None
    return jnp.pad(x_BLX, [(0, int(axis == 1)) for axis in range(x_BLX.ndim)])


def _axis(x: Array) -> int:
    """The axis of slots: behind that of heads where there is one."""
    return 2 if x.ndim > 2 else 1


def _index(x: Array, row: Array | int, slot: Array) -> tuple:
    """Of rows and slots, those of all heads where there are heads; heads come last then."""
    return (row, slice(None), slot) if _axis(x) == 2 else (row, slot)


def contiguous(
    batch: int,
    slots: int,
    heads: int,
    size: int,
    dtype: jnp.dtype,
    sinks: int = 0,
    chunk: int = 0,
    v_size: int = 0,
) -> KVCache:
    """An empty cache; with `chunk` a ring of `slots` slots, `sinks` of them for the first.

    size: of keys, and of values where `v_size` is 0.
    """

    def numbers(size: int) -> Array:  # an array each, so that a program may overwrite both
        return jnp.zeros((batch, heads, slots, size), dtype)

    def scales() -> Array | None:
        return jnp.zeros((batch, heads, slots)) if jnp.dtype(dtype) == jnp.int8 else None

    def places() -> Array:
        return jnp.zeros((batch, slots), jnp.int32)

    used_B = jnp.zeros(batch, jnp.int32)
    pairs = numbers(size), numbers(v_size or size), scales(), scales(), places(), places()
    return KVCache(*pairs, used_B, sinks, chunk)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Rows in pages of a common pool (arXiv:2309.06180): one document a row, positions from 0.

    Which pages a row has is decided outside, see lcm.decoding.pages.
    """

    cache: Cache

    @property
    def slots(self) -> int:
        """Tokens that the table has room for in a row."""
        return self.cache.slots

    def append(self, k_BLGK: Keys, v_BLGK: Values, context: Context) -> Self:
        """The cache with the tokens of each row, the padding at its end left out."""
        counts_B = (context.segments_BL > 0).sum(1, dtype=jnp.int32)
        return type(self)(append(self.cache, k_BLGK, v_BLGK, counts_B))

    def view(self) -> View:
        """The pages of each row gathered into one piece."""
        cache = self.cache
        k_BSGK = gathered(cache, cache.k_PTM, cache.k_scale_PGT)
        v_BSGK = gathered(cache, cache.v_PTM, cache.v_scale_PGT)
        positions_BS = slot_positions(cache.lengths_B, cache.slots)
        return k_BSGK, v_BSGK, _context(positions_BS, (positions_BS >= 0).astype(jnp.int32))

    def with_table(self, table_BN: Array) -> Self:
        """The cache with other pages for its rows."""
        return type(self)(dataclasses.replace(self.cache, table_BN=table_BN))

    def insert(
        self, row: Array | int, one: KVCache, start: Array | int, count: Array | int
    ) -> Self:
        """As `KVCache.insert`, into the pages that the table has for the row."""
        at_S = jnp.minimum(start + jnp.arange(one.slots), one.slots - 1)
        k_1SGK, v_1SGK, _ = one.view()
        table_1N = jax.lax.dynamic_slice_in_dim(self.cache.table_BN, row, 1)
        alone = dataclasses.replace(
            self.cache, table_BN=table_1N, lengths_B=jnp.zeros(1, jnp.int32)
        )
        alone = append(alone, k_1SGK[:, at_S], v_1SGK[:, at_S], jnp.asarray(count)[None])
        whole = {"table_BN": self.cache.table_BN}
        lengths_B = self.cache.lengths_B.at[row].set(count)
        return type(self)(dataclasses.replace(alone, **whole, lengths_B=lengths_B))


def _context(positions_BS: Array, segments_BS: Array) -> Context:
    return Context(positions_BS, segments_BS, jnp.full_like(positions_BS, -1))
