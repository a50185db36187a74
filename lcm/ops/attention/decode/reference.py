"""Decoding to be read: every row's pages gathered into one piece, then dense attention."""

import jax.numpy as jnp

from lcm.ops.attention import reference
from lcm.ops.attention.decode.cache import Cache
from lcm.ops.attention.decode.rotation import Rotation
from lcm.ops.attention.mask import Mask
from lcm.ops.attention.part import Part, Partial
from lcm.ops.attention.score import ScoreMod
from lcm.types import Array, Context, Queries


def decode(
    q_BLHK: Queries,
    cache: Cache,
    mask: Mask,
    score_mod: ScoreMod | None,
    rotation: Rotation | None,
    scale: float,
) -> Partial:
    """Attention of the last L tokens of each row to all slots that hold a token."""
    length = q_BLHK.shape[1]
    positions_BS = slot_positions(cache.lengths_B, cache.slots)
    k_BSGK = gathered(cache, cache.k_PTM, cache.k_scale_PGT)
    v_BSGK = gathered(cache, cache.v_PTM, cache.v_scale_PGT)
    if rotation is not None:
        k_BSGK = rotation(k_BSGK, positions_BS)
    q_positions = cache.lengths_B[:, None] - length + jnp.arange(length, dtype=jnp.int32)
    part = Part(q_BLHK.astype(k_BSGK.dtype), k_BSGK, mask, score_mod)
    found = reference.attend((part,), v_BSGK, _context(q_positions), _context(positions_BS), scale)
    return Partial(found.out_BLHK.astype(out_dtype(q_BLHK, cache)), found.lse_BLH)


def slot_positions(lengths_B: Array, slots: int) -> Array:
    """Position of the token in each slot, int32 `[B, S]`: the last one written; < 0 for none."""
    at = jnp.arange(slots, dtype=jnp.int32)
    return at + (lengths_B[:, None] - 1 - at) // slots * slots


def gathered(cache: Cache, x_PTM: Array, scale_PGT: Array | None) -> Array:
    """Keys or values of each row `[B, S, G, K]`, float32 if they are int8 in the cache."""
    shape = (len(cache.lengths_B), cache.slots, cache.kv_heads, -1)
    rows = (lambda x: x) if cache.table_BN is None else (lambda x: x[cache.table_BN])
    x_BSGK = rows(x_PTM).reshape(shape)
    if scale_PGT is None:
        return x_BSGK
    return x_BSGK.astype(jnp.float32) * rows(scale_PGT.swapaxes(1, 2)).reshape(shape)


def out_dtype(q_BLHK: Queries, cache: Cache) -> jnp.dtype:
    """That of the values, as in `attend`; that of the queries where values are int8."""
    return q_BLHK.dtype if cache.v_PTM.dtype == jnp.int8 else cache.v_PTM.dtype


def _context(positions: Array) -> Context:
    """One document; nothing stands at positions below 0."""
    return Context(positions, (positions >= 0).astype(jnp.int32), jnp.full_like(positions, -1))
