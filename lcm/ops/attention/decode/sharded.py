"""Decoding of each device for its own rows and heads, as the kernel cannot be partitioned by XLA.

Rows are cut over the axes `data` and `fsdp` of the mesh and heads over `HEADS`, each if it divides:

    queries, lengths    by rows; queries by heads too
    pages               by key heads: M = G K numbers of a token into equal runs of heads, scales
                        along G. By rows where each row owns its pages (a contiguous cache). A pool
                        of pages that a table gives out has no rows to be cut by: each device has
                        all of its pages, for its heads, and the table of its own rows.
    fewer key heads     than devices: each device has all heads and takes a copy of the one that
                        its queries share, again in each call. No copy is taken where there is one
                        key head; a cache that has each head once for every device avoids it too.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from lcm.ops.attention.decode.cache import Cache
from lcm.ops.attention.decode.rotation import Rotation
from lcm.ops.attention.mask import Mask
from lcm.ops.attention.part import Partial
from lcm.ops.attention.score import ScoreMod
from lcm.ops.attention.sharded import HEADS, Later, cut_of_heads
from lcm.ops.placed import axes_in_use, axes_of_rows
from lcm.types import Array, Queries

Decode = Callable[[Queries, Cache, Mask, ScoreMod | None, Rotation | None, float], Partial]


def over_mesh(decode: Decode) -> Decode:
    """`decode` in a `jax.shard_map` where a mesh is in use, the same function where none is."""

    def call(
        q_BLHK: Queries,
        cache: Cache,
        mask: Mask,
        score_mod: ScoreMod | None,
        rotation: Rotation | None,
        scale: float,
    ) -> Partial:
        axes = axes_in_use()
        if math.prod(axes.values()) == 1:
            return decode(q_BLHK, cache, mask, score_mod, rotation, scale)
        batch, _, heads, _ = q_BLHK.shape
        cut = cut_of_heads(axes, heads, cache.kv_heads)
        each = heads // cut
        rows = axes_of_rows(axes, batch)
        cells = PartitionSpec(rows, None, HEADS if cut > 1 else None)

        def own(q: Array, cache: Cache, mod: ScoreMod | None, rotation: Rotation | None) -> Partial:
            first = jax.lax.axis_index(HEADS) * each if cut > 1 else 0
            local = _own_heads(cache, cut, first * cache.kv_heads // heads)
            return decode(q, local, mask, mod and Later(mod, first), rotation, scale)

        return jax.shard_map(
            own,
            in_specs=(cells, _specs(cache, rows, cut), PartitionSpec(), PartitionSpec()),
            out_specs=Partial(cells, cells),
            axis_names=set(axes),
            check_vma=False,  # kernels do not say over which axes their results vary
        )(q_BLHK, cache, score_mod, rotation)

    return call


def _specs(cache: Cache, rows: tuple[str, ...] | None, cut: int) -> Cache:
    """The cache with the axes of the mesh that its arrays are cut over in their place."""
    owned = rows if cache.table_BN is None else None
    heads = HEADS if cut > 1 and cache.kv_heads % cut == 0 else None
    pages, scales = PartitionSpec(owned, None, heads), PartitionSpec(owned, heads)
    places = {
        "k_PTM": pages,
        "v_PTM": pages,
        "table_BN": PartitionSpec(rows),
        "lengths_B": PartitionSpec(rows),
        "k_scale_PGT": scales,
        "v_scale_PGT": scales,
    }
    given = {name: spec for name, spec in places.items() if getattr(cache, name) is not None}
    return dataclasses.replace(cache, **given)


def _own_heads(cache: Cache, cut: int, first: Array | int) -> Cache:
    """What a device holds, as a cache of its own heads: cut already, or one of all, the first."""
    if cache.kv_heads % cut == 0:
        return dataclasses.replace(cache, kv_heads=cache.kv_heads // cut)
    if cache.kv_heads == 1:
        return cache
    size = cache.k_PTM.shape[2] // cache.kv_heads

    def numbers(x_PTM: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x_PTM, first * size, size, 2)

    def scale(x_PGT: Array | None) -> Array | None:
        return x_PGT if x_PGT is None else jax.lax.dynamic_slice_in_dim(x_PGT, first, 1, 1)

    return dataclasses.replace(
        cache,
        k_PTM=numbers(cache.k_PTM),
        v_PTM=numbers(cache.v_PTM),
        k_scale_PGT=scale(cache.k_scale_PGT),
        v_scale_PGT=scale(cache.v_scale_PGT),
        kv_heads=1,
    )
