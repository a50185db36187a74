"""Rotary position embedding of keys that are cached raw."""

import dataclasses

import jax
import jax.numpy as jnp

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
