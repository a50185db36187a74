"""Rotary position embedding of keys that are cached raw."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from lcm.ops.attention.decode.layout import LANES
from lcm.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Rotation by angles in proportion to the position, pairs (i, i + R) (arXiv:2104.09864).

    inv_freq_R: float32, angular step per position. 2 R = K, or less for partial rotary: numbers
        from 2 R on stay as they are.
    factor: of cosine and sine, for the pairs alone.
    """

    inv_freq_R: Array
    factor: float | Array = 1.0

    def __call__(self, x_BSGK: Array, positions_BS: Array) -> Array:
        """Keys, or queries, rotated to their positions; angles in float32 whatever the dtype."""
        pairs = self.inv_freq_R.shape[0]
        x = x_BSGK.astype(jnp.float32)
        a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
        angles = positions_BS[:, :, None, None].astype(jnp.float32) * self.inv_freq_R
        cos, sin = self.factor * jnp.cos(angles), self.factor * jnp.sin(angles)
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
        return rotated.astype(x_BSGK.dtype)


def turns(rotation: Rotation, positions_X: Array, size: int, heads: int) -> Array:
    """Tables `[2 or 3, X, W]` that rotate rows of `heads` heads side by side, W = heads K.

        rotated = x tables[0] + roll(x, R) tables[1] + roll(x, -R) tables[2]

    Where R is half of W the two rolls are one.
    """
    pairs = rotation.inv_freq_R.shape[0]
    angles = positions_X[:, None].astype(jnp.float32) * rotation.inv_freq_R
    cos, sin = rotation.factor * jnp.cos(angles), rotation.factor * jnp.sin(angles)
    none, rest = jnp.zeros_like(sin), jnp.ones((len(positions_X), size - 2 * pairs))
    of_head = [
        jnp.concatenate([cos, cos, rest], -1),
        jnp.concatenate([none, sin, 0 * rest], -1),
        jnp.concatenate([-sin, none, 0 * rest], -1),
    ]
    if one_roll(pairs, size * heads):
        of_head = [of_head[0], of_head[1] + of_head[2]]
    return jnp.tile(jnp.stack(of_head), (1, 1, heads))


def turned(x: Array, tables: Sequence[Array], pairs: int) -> Array:
    """float32 rows `[X, W]` rotated by tables of `turns`, in a kernel."""
    moved = [_roll(x, shift) for shift in (pairs, x.shape[1] - pairs)[: len(tables) - 1]]
    return x * tables[0] + sum(m * table for m, table in zip(moved, tables[1:], strict=True))


def one_roll(pairs: int, width: int) -> bool:
    """Whether a roll by R to one side is the roll by R to the other."""
    return 2 * pairs == width


def _roll(x: Array, shift: int) -> Array:
    """Whole lanes are rotated by the hardware, others are cut and joined."""
    return pltpu.roll(x, shift, 1) if x.shape[1] % LANES == 0 else jnp.roll(x, shift, 1)
