"""Lookups in a small table inside a TPU kernel, and the gradient of the table.

    y_ij = t[n_ij]        dt[n] = sum of dy_ij over the ij where n_ij = n

Forward the table lies along lanes and is gathered from there, a register of indices at a time: one
operation for any 128 entries, in a tile of 512 x 512 and with the indices 806 bundles on v5e, 715
on v6e. A chain of selects has two operations for each entry, 4096 bundles for 32 of them; a matmul
needs the one-hot matrix first, one operation for each entry, and then sums where nothing is to add.

A scatter there is none. The gradient is a masked sum for each entry between the smallest and
largest index of the tile, so a tile far off, all of whose distances share a bucket, costs one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lcm.types import Array

LANES = 128
LARGEST = 256  # entries: a gather and a select for each 128


@jax.custom_vjp
def lookup(table: Array, index: Array) -> Array:
    """Entries at `index [R, C]` of a table `[1 or R, N]`, N in whole lanes, R rows of their own."""
    rows, columns = index.shape
    wide = _whole(index)
    tables = [
        jnp.broadcast_to(table[:, at : at + LANES], (wide.shape[0], LANES))
        for at in range(0, table.shape[1], LANES)
    ]
    found = [_gathered(tables, wide[:, at : at + LANES]) for at in range(0, wide.shape[1], LANES)]
    return jnp.concatenate(found, 1)[:rows, :columns]


def _gathered(tables: list[Array], index: Array) -> Array:
    lane = index & (LANES - 1) if len(tables) > 1 else index
    found = None
    for n, table in enumerate(tables):
        here = jnp.take_along_axis(table, lane, axis=1, mode="promise_in_bounds")
        found = here if found is None else jnp.where(index >= n * LANES, here, found)
    return found


def _whole(index: Array) -> Array:
    """Spread over whole registers."""
    rows, columns = index.shape
    if rows == 1:
        index = jnp.broadcast_to(index, (8, columns))
    if columns == 1:
        return jnp.broadcast_to(index, (index.shape[0], LANES))
    missing = -columns % LANES
    empty = jnp.zeros((index.shape[0], missing), index.dtype)
    return jnp.concatenate([index, empty], 1) if missing else index


def _forward(table: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
    return lookup(table, index), (table, index)


def _backward(kept: tuple[Array, Array], d: Array) -> tuple[Array, np.ndarray]:
    table, index = kept
    if table.shape[0] > 1:
        raise NotImplementedError("a table for each row has no gradient: decoding needs none")
    ends = index.astype(jnp.float32)  # integers have no reductions to a number
    first, last = ends.min().astype(jnp.int32), ends.max().astype(jnp.int32)
    lane = jax.lax.broadcasted_iota(jnp.int32, table.shape, 1)

    def add(n: Array, total: Array) -> Array:
        return total + jnp.where(lane == n, jnp.where(index == n, d, 0.0).sum(), 0.0)

    total = jax.lax.fori_loop(first, last + 1, add, jnp.zeros_like(table))
    return total, np.zeros(index.shape, jax.dtypes.float0)


lookup.defvjp(_forward, _backward)
