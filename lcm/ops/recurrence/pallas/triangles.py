"""Inverses of unit lower triangular matrices in vector memory, of several at once.

What `lcm.ops.recurrence.inverse` does from blocks of size 1, this does from blocks of 16: on
vector units row by row, all of a matrix beside each other in lanes, and from there to twice the
size by products.
"""

import jax
import jax.numpy as jnp

from lcm.ops.recurrence.pallas.products import dot
from lcm.types import Array

BLOCK = 16  # rows that are substituted one after the other


def inverses(strict_MCC: list[Array]) -> list[Array]:
    """`(I - A)^-1` of strictly lower triangular A, float32 `[C, C]`; C is 16 times a power of two.

    Two neighbours X and Y on the diagonal, and A between them, are joined by `Y^-1 A X^-1`. The
    steps of one matrix wait for each other, those of several do not.
    """
    size = len(strict_MCC[0])
    found = [_on_diagonal(A_CC) for A_CC in strict_MCC]
    half = BLOCK
    while half < size:
        pairs = list(zip(found, strict_MCC, strict=True))
        first = [dot(_second(T, half), _corners(A, half), (1, 0)) for T, A in pairs]
        corners = [dot(x, T, (1, 0)) for x, T in zip(first, found, strict=True)]
        found = [_joined(T, x, half) for T, x in zip(found, corners, strict=True)]
        half *= 2
    return found


def _on_diagonal(A_CC: Array) -> Array:
    """Inverses of the blocks on the diagonal, `[C, C]`.

    Of `X = I + A X`, row j is done when those above it have been added, and then goes to those
    below it.
    """
    size = len(A_CC)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK, size), axis) for axis in (0, 1))
    block = lane // BLOCK
    A = jnp.zeros((BLOCK, size), jnp.float32)
    for at in range(size // BLOCK):
        A = jnp.where(block == at, A_CC[at * BLOCK : (at + 1) * BLOCK], A)
    X = jnp.where(lane % BLOCK == row, 1.0, 0.0)
    for j in range(BLOCK - 1):
        X += jnp.take_along_axis(A, block * BLOCK + j, 1) * X[j : j + 1]
    return jnp.concatenate([jnp.where(block == at, X, 0.0) for at in range(size // BLOCK)], 0)


def _second(T_CC: Array, half: int) -> Array:
    """The rows of the second of each pair of blocks, `[C / 2, C]`."""
    starts = range(half, len(T_CC), 2 * half)
    return jnp.concatenate([T_CC[start : start + half] for start in starts], 0)


def _corners(A_CC: Array, half: int) -> Array:
    """What is below the first and left of the second of each pair."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, A_CC.shape, axis) for axis in (0, 1))
    row, column = row // half, column // half
    return jnp.where((row % 2 == 1) & (column == row - 1), A_CC, 0.0)


def _joined(T_CC: Array, corners: Array, half: int) -> Array:
    """T with corners, `[C / 2, C]`, added to the rows of the second of each pair."""
    rows = []
    for start in range(0, len(T_CC), 2 * half):
        own = corners[start // 2 : start // 2 + half]
        rows += [T_CC[start : start + half], T_CC[start + half : start + 2 * half] + own]
    return jnp.concatenate(rows, 0)
