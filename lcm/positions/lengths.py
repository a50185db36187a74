"""How long a document is, for encodings that depend on it."""

import jax
import jax.numpy as jnp

from lcm.types import Array, Context


def lengths(of: Context, among: Context) -> Array:
    """1 + the largest position that the document of each place has among others, int32 `[B, L]`.

    The length of the document so far, where positions count its tokens; 0 for one that is not
    there. Documents may lie anywhere in a row, in any order, as in a cache.
    """

    def row(wanted: Array, segments: Array, positions: Array) -> Array:
        segments, positions = jax.lax.sort((segments, positions), num_keys=2)
        last = jnp.searchsorted(segments, wanted, side="right") - 1
        there = (last >= 0) & (segments[last] == wanted)
        return jnp.where(there, positions[last] + 1, 0)

    segments = [jnp.asarray(x, jnp.int32) for x in (of.segments_BL, among.segments_BL)]
    return jax.vmap(row)(*segments, jnp.asarray(among.positions_BL, jnp.int32))


def both(q_context: Context, k_context: Context) -> tuple[Array, Array]:
    """Lengths of the documents of queries and of keys, among the keys."""
    of_keys = lengths(k_context, k_context)
    same = q_context is k_context
    return (of_keys if same else lengths(q_context, k_context)), of_keys
