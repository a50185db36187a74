"""Orders in which the layers of a stack read a grid (Mamba-ND, Li et al., arXiv:2402.05892).

A mixer reads a sequence. Which sequence a grid is may differ by layer: the tokens are permuted
before a layer and put back after it, and no mixer knows. Text is the grid with one axis, where
layers read forwards and backwards in turn: an encoder of both directions.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lcm.errors import ConfigError
from lcm.ops.recurrence import boundaries
from lcm.types import Array, Context

# Orders of axes, slowest first, each read forwards and then backwards. Those of three axes (time,
# height, width) are the three published ones of six.
AXES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((0,),),
    2: ((0, 1), (1, 0)),
    3: ((0, 1, 2), (0, 2, 1), (2, 1, 0)),
}


@functools.cache
def grid_orders(grid: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """The cycle of orders of a grid: place n of layer i reads token `orders[i % cycle][n]`.

    Tokens are numbered with the last axis fastest; cycles are of 2, 4 and 6 for 1, 2 and 3 axes.

    Raises:
        ConfigError: for a grid of other axes, or one without a cell.
    """
    if len(grid) not in AXES or min(grid) < 1:
        raise ConfigError(f"grid {grid} has no orders: give 1 to 3 axes of 1 or more cells each")
    cells = np.arange(math.prod(grid)).reshape(grid)
    forwards = [np.ascontiguousarray(cells.transpose(axes)).ravel() for axes in AXES[len(grid)]]
    return tuple(order for each in forwards for order in (each, each[::-1]))


def reordered(x_BL: Array, order_L: np.ndarray) -> Array:
    """Tokens in an order, along axis 1 of `[B, L, ...]`."""
    if _is_reversed(order_L):  # a flip costs no gather
        return jnp.flip(x_BL, 1)
    return x_BL if _is_plain(order_L) else jnp.take(x_BL, order_L, axis=1)


def restored(x_BL: Array, order_L: np.ndarray) -> Array:
    """The tokens where they were before `reordered`."""
    return reordered(x_BL, np.argsort(order_L))


def reordered_context(context: Context, order_L: np.ndarray) -> Context:
    """Where tokens stand in an order: positions count from 0 in each document, in that order.

    In the plain order nothing changes. Padding stays padding wherever it comes to lie, so that a
    padded row read backwards begins with it.
    """
    if _is_plain(order_L):
        return context
    segments_BL = reordered(context.segments_BL, order_L)
    begins_BL, _ = boundaries(segments_BL, jnp.zeros(len(segments_BL), jnp.int32))
    # Tokens that are there so far, less those before the document.
    there_BL = (segments_BL > 0).astype(jnp.int32)
    place_BL = jnp.cumsum(there_BL, axis=1) - there_BL
    first_BL = jax.lax.cummax(jnp.where(begins_BL, place_BL, 0), axis=1)
    positions_BL = jnp.where(there_BL > 0, place_BL - first_BL, 0)
    # Neither how far a token is from its document's end nor its own time is the order's to change.
    remaining_BL = reordered(context.remaining_BL, order_L)
    pace_BL = None if context.pace_BL is None else reordered(context.pace_BL, order_L)
    return Context(positions_BL, segments_BL, remaining_BL, pace_BL)


def _is_plain(order_L: np.ndarray) -> bool:
    return bool((order_L == np.arange(len(order_L))).all())


def _is_reversed(order_L: np.ndarray) -> bool:
    return len(order_L) > 1 and _is_plain(order_L[::-1])
