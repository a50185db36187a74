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


def turns(rotation: Rotation, positions_X: Array, size: int, heads: int) -> Array:
    """Tables `[2, X, W]` that rotate within a product, for `heads` heads side by side.

    For a query (x, y, r) and a key (a, b, c), pairs in the first two pieces,

        q . U(p) k  =  q . (k tables[0, p]) + swapped(q) . (k tables[1, p])

    since it is a (x cos + y sin) + b (y cos - x sin) + r c. So keys are multiplied in place.
    """
    pairs = rotation.inv_freq_R.shape[0]
    angles = positions_X[:, None].astype(jnp.float32) * rotation.inv_freq_R
    cos, sin = rotation.factor * jnp.cos(angles), rotation.factor * jnp.sin(angles)
    rest = jnp.ones((len(positions_X), size - 2 * pairs))
    of_head = [
        jnp.concatenate([cos, cos, rest], -1),
        jnp.concatenate([sin, -sin, 0 * rest], -1),
    ]
    return jnp.tile(jnp.stack(of_head), (1, 1, heads))


def swapped(q_BLHK: Array, pairs: int) -> Array:
    """(x, y, r) as (y, x, r), the first two of `pairs` numbers each."""
    x, y, rest = jnp.split(q_BLHK, (pairs, 2 * pairs), axis=-1)
    return jnp.concatenate([y, x, rest], axis=-1)
