"""Lists of the tiles that block maps leave, for kernels that visit no others.

A tile takes two words of scalar memory (`walk.word`):

    own << 16 | other
    first of its block, last of it, masked and plain of each part, shared head

Blocks that see nothing have one visit without work, which writes their zeros.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from lcm.ops.attention.pallas import walk
from lcm.ops.attention.pallas.tiles import Tiles
from lcm.types import Array

WORDS = 192 << 10  # in scalar memory, of 1 MiB


@dataclasses.dataclass(frozen=True)
class Room:
    """Lists of a call: one for all heads or one a head, and how many tiles they may have."""

    heads: int  # 1, or of queries
    key_heads: int
    by_query: int
    by_key: int

    def check(self, batch: int) -> None:
        """Raise a `ValueError` unless the lists of so many rows fit in scalar memory."""
        words = 2 * batch * max(self.heads * self.by_query, self.key_heads * self.by_key)
        if words > WORDS:
            raise ValueError(
                f"block maps of {self.heads} heads and {batch} rows take {words} words of scalar "
                f"memory, at most {WORDS} are to be had: take fewer rows or heads a device, larger "
                'blocks, or backend="blockwise"'
            )


def room(near: np.ndarray, some: list, most: list[np.ndarray], kv_heads: int, shared: int) -> Room:
    """How long lists may become: of tiles `near` the diagonal, those that maps list some of.

    some: bool `[H or 1, q, k]` of each part. Where not all are NumPy, `most` has upper bounds of
        the tiles for each block of queries.
    """
    heads = max(x.shape[0] for x in some)
    if all(isinstance(x, np.ndarray) for x in some):
        seen = np.logical_or.reduce([np.broadcast_to(x, (heads, *near.shape)) for x in some])
        tiles = int((seen & near).sum((1, 2)).max())
    else:
        tiles = int(np.minimum(sum(most), near.sum(1)).sum())
    q_blocks, k_blocks = near.shape
    key_heads = kv_heads if heads > 1 else 1
    return Room(heads, key_heads, tiles + q_blocks, shared * tiles + k_blocks)


def visits(live: Array, plain: Array, room: Room, kv_heads: int, shared: int) -> Tiles:
    """Lists from the kinds of tiles `[N, B, H or 1, q_blocks, k_blocks]`."""
    by_query = [x[:, :, :, :, None] for x in (live, plain)]
    by_key = [_per_key(x, kv_heads, shared) for x in (live, plain)]
    queries, key_steps = _list(*by_query, room.by_query)
    keys, query_steps = _list(*by_key, room.by_key)
    return Tiles(queries, keys, key_steps, query_steps)


def _per_key(x: Array, kv_heads: int, shared: int) -> Array:
    """`[N, B, G or 1, k_blocks, shared, q_blocks]`."""
    parts, batch, heads, q_blocks, k_blocks = x.shape
    x = x.swapaxes(3, 4)
    if heads == 1:
        x = x[:, :, :, :, None]
        return jnp.broadcast_to(x, (parts, batch, 1, k_blocks, shared, q_blocks))
    return x.reshape(parts, batch, kv_heads, shared, k_blocks, q_blocks).swapaxes(3, 4)


def _list(live: Array, plain: Array, length: int) -> tuple[Array, Array]:
    """The list of `[N, B, H, own, shared, other]` in this order, flat, and the longest of them."""
    shared, other = live.shape[-2:]
    some = live.any(0)
    none = ~some.any((-2, -1), keepdims=True)
    start = (jnp.arange(shared)[:, None] == 0) & (jnp.arange(other) == 0)
    flat = lambda x: x.reshape(*x.shape[:-3], -1)  # noqa: E731
    wanted = flat(some | (none & start))
    count = wanted.sum(-1, keepdims=True)
    order = jnp.argsort(~wanted, axis=-1, stable=True)[..., :length]
    order = jnp.pad(order, ((0, 0), (0, 0), (0, length - order.shape[-1])))
    at = jnp.arange(length)
    real = at < count
    order = jnp.where(real, order, jnp.take_along_axis(order, count - 1, -1))
    block = order // (shared * other)
    change = block[..., 1:] != block[..., :-1]
    first = real & jnp.pad(change, ((0, 0), (0, 0), (1, 0)), constant_values=True)
    last = real & (
        jnp.pad(change, ((0, 0), (0, 0), (0, 1)), constant_values=True) | (at == count - 1)
    )
    of = lambda x: jnp.take_along_axis(flat(x), order, -1) & real  # noqa: E731
    kinds = [(of(some & ~every), of(every)) for some, every in zip(live, live & plain, strict=True)]
    words = block << 16 | order % other, walk.word(first, last, kinds, order // other % shared)
    return jnp.stack(words).astype(jnp.int32).reshape(-1), count.max()
