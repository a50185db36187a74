"""Some queries at a time, for encodings whose scores of all of them would not fit memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lcm.types import Array, Context, Queries


def in_rows(
    attend: Callable[[Queries, Context], Queries], q_BLHK: Queries, context: Context, most: int
) -> Queries:
    """`attend` on at most so many queries at a time, the results joined again.

    Padding of the last ones is of segment 0, so it sees nothing.
    """
    batch, length = q_BLHK.shape[:2]
    if length <= most:
        return attend(q_BLHK, context)

    def rows(x: Array) -> Array:
        """`[B, L, ...]` as `[L / most, B, most, ...]`."""
        x = jnp.pad(x, [(0, 0), (0, -length % most)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, most, *x.shape[2:]), 1, 0)

    out = jax.lax.map(lambda own: attend(*own), (rows(q_BLHK), jax.tree.map(rows, context)))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])[:, :length]
