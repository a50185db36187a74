"""Block maps in kernels: the tiles that a map lists, and what it lists of a tile.

Tiles and blocks of a map need not divide each other. Each query has its row of the map along, the
numbers of the blocks that it sees. In a tile they become one word a query, a bit for each block of
keys that the tile holds part of, and a key is seen if the bit of its block is set.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lcm.ops.attention.blocks import BlockMap
from lcm.types import Array

SIDE = 256  # of a tile, for maps of smaller blocks: few others in it, and work for a step of a grid
BITS = 32  # blocks of keys in a tile
FULL = -2  # in the place of a block's number: all of them


class Form(NamedTuple):
    """Tokens of a block, and the row of what is known of keys that has each one's block."""

    size: int
    row: int


def side(maps: list[BlockMap], largest: int) -> int:
    """Side of the largest tile for some maps: as large as their blocks, or `SIDE`.

    Raises:
        ValueError: if a tile has more blocks than a word has bits.
    """
    smallest = min(blocks.size for blocks in maps)
    found = min(largest, max(SIDE, smallest))
    if found // smallest + 2 > BITS:
        least = next(size for size in range(1, found) if found // size + 2 <= BITS)
        raise ValueError(
            f"blocks of {smallest} tokens are too small for a TPU kernel's map: take at least "
            f'{least}, or backend="blockwise"'
        )
    return found


def lists(blocks: BlockMap, length: int) -> Array:
    """Numbers of the blocks that each of `length` queries sees, int32 `[H, N, L]`, N in eights."""
    indices = jnp.asarray(blocks.indices_HQN, jnp.int32)
    if blocks.full:
        indices = indices.at[:, jnp.asarray(blocks.full)].set(FULL)
    indices = jnp.repeat(indices.swapaxes(1, 2), blocks.size, axis=2)[:, :, :length]
    missing = (0, 0), (0, -indices.shape[1] % 8), (0, length - indices.shape[2])
    return jnp.pad(indices, missing, constant_values=-1)


def words(listed: Array, first: Array) -> Array:
    """A bit for each of the blocks from `first` on, `[1, Q]` from `[N, Q]`."""
    bit = listed - first
    inside = (bit >= 0) & (bit < BITS)
    found = jnp.where(inside, jnp.left_shift(jnp.int32(1), jnp.where(inside, bit, 0)), 0)
    found = jnp.where(listed == FULL, -1, found)
    for rows in (8, 1):  # integers have no reductions
        pieces = [found[at : at + rows] for at in range(0, found.shape[0], rows)]
        found = pieces[0]
        for piece in pieces[1:]:
            found = found | piece
    return found


def kinds(blocks: BlockMap, slots: int, tiles: tuple[int, int], sides: tuple[int, int]):
    """Tiles that the map lists some of and tiles that it lists all of, bool `[H, q, k]`.

    NumPy where the map is, so that what it lists is known before it runs.
    """
    xp = np if isinstance(blocks.indices_HQN, np.ndarray) else jnp
    indices = xp.asarray(blocks.indices_HQN)
    heads, rows, _ = indices.shape
    full = xp.isin(xp.arange(rows), xp.asarray(blocks.full, dtype=int))
    listed = (indices >= 0) & ~full[:, None]
    counts = xp.zeros((heads, *tiles), xp.int32)
    head = np.arange(heads)[:, None, None]
    for q_tile, q_meets in _meets(xp.arange(rows), blocks.size, sides[0], tiles[0], xp):
        for k_tile, k_meets in _meets(xp.maximum(indices, 0), blocks.size, sides[1], tiles[1], xp):
            more = (listed & q_meets[:, None] & k_meets).astype(xp.int32)
            at = head, xp.broadcast_to(q_tile[:, None], k_tile.shape), k_tile
            counts = _added(counts, at, more, xp)
    held = [
        _held(count, blocks.size, side, tile)
        for count, side, tile in zip((rows, -(-slots // blocks.size)), sides, tiles, strict=True)
    ]
    of_full = _held(rows, blocks.size, sides[0], tiles[0], np.isin(np.arange(rows), blocks.full))
    counts = counts + (of_full[:, None] * held[1]).astype(np.int32)
    return counts > 0, counts == held[0][:, None] * held[1]


def most(
    blocks: BlockMap, length: int, tiles: tuple[int, int], sides: tuple[int, int]
) -> np.ndarray:
    """An upper bound, from shapes alone, of the tiles that each block of queries is listed in."""
    rows, size = -(-length // blocks.size), blocks.size
    each = sum(1 for _ in _meets(np.arange(1), size, sides[1], tiles[1], np))
    held = _held(rows, size, sides[0], tiles[0])
    of_full = _held(rows, size, sides[0], tiles[0], np.isin(np.arange(rows), blocks.full))
    listed = (held - of_full) * blocks.indices_HQN.shape[2] * each
    return np.minimum(listed + of_full * tiles[1], tiles[1])


def _meets(block: Array, size: int, side: int, tiles: int, xp):
    """Tiles that blocks lie in, as many as one may: the n-th of each, and whether there is one."""
    apart = side % size == 0 or size % side == 0
    for n in range(-(-size // side) if apart else (size - 2) // side + 2):
        tile = block * size // side + n
        yield xp.minimum(tile, tiles - 1), (tile * side < (block + 1) * size) & (tile < tiles)


def _held(count: int, size: int, side: int, tiles: int, which: np.ndarray | None = None):
    """How many blocks, or how many of some, each tile holds part of."""
    held = np.zeros(tiles, np.int64)
    some = np.arange(count) if which is None else np.flatnonzero(which)
    for tile, meets in _meets(some, size, side, tiles, np):
        np.add.at(held, tile, meets)
    return held


def _added(counts: Array, at: tuple, more: Array, xp) -> Array:
    if xp is jnp:
        return counts.at[at].add(more)
    np.add.at(counts, at, more)
    return counts
