"""Keys and values in pages: a ring buffer for each row, wherever its pages lie (arXiv:2309.06180).

A row that has been given `length` tokens keeps the last N T of them: position p lies in slot
`p % (N T)` of the row, that is in place `p % T` of the page that its table names at
`p // T % N`. So a row that fits, a ring that has wrapped and a contiguous cache are one thing.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lcm.ops import int8
from lcm.types import Array, Keys, Values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Pages of keys and values, and which of them belong to which row.

    k, v: `[P, T, M]`, the G key heads of a token side by side: a page is one piece of memory, and
        heads narrower than the 128 lanes of a TPU take no more room than they need.
    table_BN: int32 page numbers of each row, -1 where it has none; pages may be shared by rows
        that do not write to them. `None`: row b owns pages b N to (b + 1) N - 1.
    lengths_B: int32, tokens written so far.
    k_scale, v_scale: float32 `[P, G, T]` for int8 keys and values, else `None`.
    kv_heads: G.
    """

    k_PTM: Array
    v_PTM: Array
    table_BN: Array | None
    lengths_B: Array
    k_scale_PGT: Array | None = None
    v_scale_PGT: Array | None = None
    kv_heads: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def page(self) -> int:
        """T, tokens of a page."""
        return self.k_PTM.shape[1]

    @property
    def slots(self) -> int:
        """N T, tokens that a row can keep."""
        batch = self.lengths_B.shape[0]
        if self.table_BN is None:
            return self.k_PTM.shape[0] // batch * self.page
        return self.table_BN.shape[1] * self.page

    @property
    def pages_BN(self) -> Array:
        """The table, written out where it is the identity."""
        if self.table_BN is not None:
            return self.table_BN
        return jnp.arange(self.k_PTM.shape[0], dtype=jnp.int32).reshape(len(self.lengths_B), -1)

    def check(self) -> None:
        """Raise a `ValueError` unless the arrays fit each other."""
        k, v, batch = self.k_PTM, self.v_PTM, self.lengths_B.shape
        if k.ndim != 3 or k.shape != v.shape or k.shape[2] % self.kv_heads:
            raise ValueError(
                f"keys {k.shape} and values {v.shape} of a cache must have one shape "
                f"[pages, tokens, {self.kv_heads} heads x size]"
            )
        if len(batch) != 1:
            raise ValueError(f"lengths_B has shape {batch}: it must have one length for each row")
        table = self.table_BN
        if table is None and k.shape[0] % batch[0]:
            raise ValueError(
                f"{k.shape[0]} pages are not the same number for each of {batch[0]} rows: "
                "give the cache a table_BN"
            )
        if table is not None and (table.ndim != 2 or table.shape[0] != batch[0]):
            raise ValueError(
                f"table_BN has shape {table.shape}: it must have {batch[0]} rows of page numbers, "
                "as there are lengths"
            )
        for name, x, scale in (("k", k, self.k_scale_PGT), ("v", v, self.v_scale_PGT)):
            wanted = (k.shape[0], self.kv_heads, self.page) if x.dtype == jnp.int8 else None
            found = None if scale is None else scale.shape
            if found != wanted:
                raise ValueError(
                    f"{name}_scale_PGT is {found}, for a cache of {x.dtype} it must be {wanted}: "
                    "build caches with contiguous(...) or paged(...)"
                )


def paged(
    table_BN: Array, pages: int, heads: int, size: int, dtype: jnp.dtype, page: int = 128
) -> Cache:
    """An empty cache of `pages` pages, given to rows by a table; `heads` are key heads."""
    table_BN = jnp.asarray(table_BN, jnp.int32)
    return _empty(table_BN, pages, table_BN.shape[0], heads, size, dtype, page)


def contiguous(
    batch: int, slots: int, heads: int, size: int, dtype: jnp.dtype, page: int = 128
) -> Cache:
    """An empty cache whose rows lie one behind the other, of at least `slots` tokens each.

    With masks that hide all before a window of W tokens, and L queries at a time, W + L - 1 slots
    are enough for a row of any length.
    """
    return _empty(None, batch * -(-slots // page), batch, heads, size, dtype, page)


def _empty(
    table_BN: Array | None,
    pages: int,
    batch: int,
    heads: int,
    size: int,
    dtype: jnp.dtype,
    page: int,
) -> Cache:
    def numbers() -> Array:  # an array each, so that a program may be given both to overwrite
        return jnp.zeros((pages, page, heads * size), dtype)

    def scale() -> Array | None:
        return jnp.zeros((pages, heads, page)) if jnp.dtype(dtype) == jnp.int8 else None

    lengths_B = jnp.zeros(batch, jnp.int32)
    return Cache(numbers(), numbers(), table_BN, lengths_B, scale(), scale(), heads)


def append(
    cache: Cache,
    k_BLGK: Keys,
    v_BLGK: Values,
    counts_B: Array | None = None,
    *,
    ring: bool = False,
) -> Cache:
    """The cache with new tokens at the end of each row, int8 caches rounded to nearest.

    Args:
        cache: what to append to.
        k_BLGK: keys; any number of them, as in a prefill.
        v_BLGK: values.
        counts_B: how many of the L tokens to take for each row, from the first; all by default.
        ring: tokens that do not fit overwrite the oldest. Otherwise they are an error where
            lengths are known; inside `jax.jit` they are not, so look before.

    Raises:
        ValueError: if shapes do not fit, or a row has no page for a token.
    """
    cache.check()
    length, heads, size = k_BLGK.shape[1:]
    batch, slots, page = len(cache.lengths_B), cache.slots, cache.page
    wanted = (batch, length, cache.kv_heads, cache.k_PTM.shape[2] // cache.kv_heads)
    if k_BLGK.shape != wanted or v_BLGK.shape != wanted:
        raise ValueError(
            f"keys {k_BLGK.shape} and values {v_BLGK.shape} do not fit the cache, which takes "
            f"{wanted}"
        )
    counts_B = jnp.full(batch, length, jnp.int32) if counts_B is None else jnp.asarray(counts_B)
    if counts_B.shape != (batch,):
        raise ValueError(f"counts_B has shape {counts_B.shape}: it must be ({batch},)")
    at = jnp.arange(length, dtype=jnp.int32)
    slot_BL = (cache.lengths_B[:, None] + at) % slots
    page_BL = jnp.take_along_axis(cache.pages_BN, slot_BL // page, axis=1)
    # of tokens that fall into one slot the last stays
    kept_BL = (at < counts_B[:, None]) & (at >= counts_B[:, None] - slots)
    _check_room(cache, counts_B, page_BL, kept_BL, ring)
    page_BL = jnp.where(kept_BL & (page_BL >= 0), page_BL, cache.k_PTM.shape[0])

    def put(pages: Array, new: Array) -> Array:
        new = new.reshape(batch, length, heads * size).astype(pages.dtype)
        return pages.at[page_BL, slot_BL % page].set(new, mode="drop")

    def put_scale(pages: Array | None, new: Array | None) -> Array | None:
        if pages is None:
            return None
        return pages.at[page_BL, :, slot_BL % page].set(new, mode="drop")

    (k, k_scale), (v, v_scale) = (
        quantised(x) if cache.k_PTM.dtype == jnp.int8 else (x, None) for x in (k_BLGK, v_BLGK)
    )
    return dataclasses.replace(
        cache,
        k_PTM=put(cache.k_PTM, k),
        v_PTM=put(cache.v_PTM, v),
        k_scale_PGT=put_scale(cache.k_scale_PGT, k_scale),
        v_scale_PGT=put_scale(cache.v_scale_PGT, v_scale),
        lengths_B=cache.lengths_B + counts_B.astype(jnp.int32),
    )


def quantised(x_BLGK: Array) -> tuple[Array, Array]:
    """int8 and float32 scales `[B, L, G]`: `x = scale q` to within half a scale."""
    q_BLGK, scale_BLG1 = int8.quantised(x_BLGK, -1)
    return q_BLGK, scale_BLG1[..., 0]


def _check_room(cache: Cache, counts_B: Array, page_BL: Array, kept_BL: Array, ring: bool) -> None:
    if any(isinstance(x, jax.core.Tracer) for x in (cache.lengths_B, counts_B, page_BL)):
        return
    after = cache.lengths_B + counts_B
    if not ring and (after > cache.slots).any():
        row = int(after.argmax())
        raise ValueError(
            f"row {row} has {cache.lengths_B[row]} tokens and gets {counts_B[row]}, its pages hold "
            f"{cache.slots}: make the table longer, or pass ring=True to overwrite the oldest"
        )
    if (kept_BL & (page_BL < 0)).any():
        row = int((kept_BL & (page_BL < 0)).any(1).argmax())
        raise ValueError(
            f"row {row} has {cache.lengths_B[row]} tokens and gets {counts_B[row]}, its table "
            f"{cache.pages_BN[row]} has no page there: put page numbers in place of -1"
        )
