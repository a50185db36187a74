"""Which tiles of a block of queries and a block of keys are computed, and which need a mask.

For every block of queries (forward, gradient of queries) and every block of keys (gradient of
keys) the kernels are told, as prefetched numbers, the first block on the other side that some part
may see, and for each part the run of blocks it may see and the run inside it that is visible
throughout:

    table[field, b, block],  fields: first of all parts; first, last, plain first, plain last of
                             part 0; of part 1; ...

Blocks outside a run are neither loaded nor computed, tiles of the plain run take no mask.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lcm.ops.attention.mask import FAR, Mask
from lcm.types import Array

SEGMENT, POSITION = 0, 1  # rows of what is known about queries and keys; queries' intervals follow


class Tiles(NamedTuple):
    """The two tables, flat as scalar memory wants them, and the longest run in each."""

    by_query: Array
    by_key: Array
    key_steps: Array
    query_steps: Array


def interval(mask: Mask, q_pos: Array) -> tuple[Array | None, Array | None]:
    """First and last visible key position per query; `None` where the mask has no such side."""
    lowers = [low for bound in mask.bounds if (low := bound.lower(q_pos)) is not None]
    uppers = [high for bound in mask.bounds if (high := bound.upper(q_pos)) is not None]
    return (
        functools.reduce(jnp.maximum, lowers) if lowers else None,
        functools.reduce(jnp.minimum, uppers) if uppers else None,
    )


def inside(
    band: tuple[int | None, int | None], q_blocks: int, k_blocks: int, queries: int, keys: int
) -> np.ndarray:
    """bool `[q_blocks, k_blocks]`: tiles that hold a pair of indices inside the band."""
    q, k = np.arange(q_blocks)[:, None] * queries, np.arange(k_blocks)[None] * keys
    nearest, farthest = k - (q + queries - 1), k + keys - 1 - q  # smallest and largest k - q
    below, above = band
    return (farthest >= (-FAR if below is None else below)) & (
        nearest <= (FAR if above is None else above)
    )


def share(
    band: tuple[int | None, int | None], row: tuple[int, int], queries: int, keys: int
) -> float:
    """Of all tiles of a row's shards those inside the band, on the mean: `row` is that of a part.

    Which shards meet does not matter: what one device or step has more of, another has less.
    """
    length, apart = row
    q, k = queries * apart, keys * apart
    return float(inside(band, -(-length // q), -(-length // k), q, k).mean())


def kinds(
    q_info: Array, k_info: Array, rows: tuple, queries: int, keys: int
) -> tuple[Array, Array]:
    """Tiles that may show something and tiles that show all, bool `[N, B, q_blocks, k_blocks]`.

    Both from smallest and largest numbers of each block: what may show something may still not.
    """
    real_q, real_k = (_blocks(x[:, SEGMENT] > 0, n) for x, n in ((q_info, queries), (k_info, keys)))
    q_seg, k_seg = _blocks(q_info[:, SEGMENT], queries), _blocks(k_info[:, SEGMENT], keys)
    k_pos = _blocks(k_info[:, POSITION], keys)
    q_first, q_last, k_first, k_last = *_ends(q_seg, real_q), *_ends(k_seg, real_k)
    k_low, k_high = _ends(k_pos, real_k)
    meet = (q_first[:, :, None] <= k_last[:, None]) & (k_first[:, None] <= q_last[:, :, None])
    one = (q_first == q_last) & real_q.all(-1), (k_first == k_last) & real_k.all(-1)
    same = meet & one[0][:, :, None] & one[1][:, None]
    live, plain = [], []
    for lower, upper in rows:
        some, every = meet, same
        if lower is not None:
            low, high = _ends(_blocks(q_info[:, lower], queries), real_q)
            some &= low[:, :, None] <= k_high[:, None]
            every &= high[:, :, None] <= k_low[:, None]
        if upper is not None:
            low, high = _ends(_blocks(q_info[:, upper], queries), real_q)
            some &= k_low[:, None] <= high[:, :, None]
            every &= k_high[:, None] <= low[:, :, None]
        live.append(some)
        plain.append(every)
    return jnp.stack(live), jnp.stack(plain)


def tiles(live: Array, plain: Array) -> Tiles:
    """Tables from the kinds of tiles `[N, B, q_blocks, k_blocks]`."""
    (by_query, key_steps), (by_key, query_steps) = (
        _table(live, plain),
        _table(live.swapaxes(2, 3), plain.swapaxes(2, 3)),
    )
    return Tiles(by_query, by_key, key_steps, query_steps)


def _table(live: Array, plain: Array) -> tuple[Array, Array]:
    first, last = _run(live.any(0))
    fields = [first]
    for part, whole in zip(live, plain, strict=True):
        start, _ = _run(whole)
        at = jnp.arange(whole.shape[-1], dtype=jnp.int32)
        broken = ~whole & (at > start[..., None])
        stop = jnp.where(broken, at, whole.shape[-1]).min(-1) - 1  # the first run without a gap
        stop = jnp.where(whole.any(-1), stop, -1)
        fields += [*_run(part), start, stop]
    return jnp.stack(fields).reshape(-1), jnp.maximum(1, (last - first + 1).max())


def _run(live: Array) -> tuple[Array, Array]:
    """First and last block that is live, int32; 0 and -1 where none is."""
    at, count = jnp.arange(live.shape[-1], dtype=jnp.int32), live.shape[-1]
    last = jnp.where(live, at, -1).max(-1)
    return jnp.where(last < 0, 0, jnp.where(live, at, count).min(-1)), last


def _blocks(x: Array, size: int) -> Array:
    return x.reshape(x.shape[0], -1, size)


def _ends(x: Array, real: Array) -> tuple[Array, Array]:
    """Smallest and largest over the real tokens of each block; an empty range where none is."""
    return jnp.where(real, x, FAR).min(-1), jnp.where(real, x, -FAR).max(-1)
