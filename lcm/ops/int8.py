"""Symmetric int8: numbers and a scale, `x = scale q` to within half a scale."""

import jax.numpy as jnp

from lcm.types import Array

MOST = 127  # the largest number


def quantised(x: Array, axis: int) -> tuple[Array, Array]:
    """int8 and float32 scales, one for each place off the axis, kept as an axis of size 1."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(axis, keepdims=True) / MOST
    return jnp.round(wide / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8), scale
