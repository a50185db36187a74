"""Normalisation."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.ops.recompute import recomputed
from lcm.types import Array


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` in float32 (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        # The backward pass keeps x alone.
        return recomputed(functools.partial(_rms_norm, self.eps))(x, self.scale[...])


def _rms_norm(eps: float, x: Array, scale: Array) -> Array:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale).astype(x.dtype)
