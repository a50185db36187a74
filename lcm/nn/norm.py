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


class UnscaledNorm(nnx.Module):
    """`x / rms(x)` in float32, of any width: RMSNorm without a scale, as in Falcon-Mamba."""

    def __init__(self, width: int, eps: float):
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return recomputed(functools.partial(_unscaled_norm, self.eps))(x)


class CentredNorm(nnx.Module):
    """`(x - mean(x)) / std(x) * scale` in float32: LayerNorm without a bias, as in MPT.

    Of a width `(H, P)`, each head's P channels apart: a group norm.
    """

    def __init__(self, width: int | tuple[int, int], eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return recomputed(functools.partial(_centred_norm, self.eps))(x, self.scale[...])


class LayerNorm(nnx.Module):
    """`(x - mean(x)) / std(x) * scale + bias` in float32 (Ba et al., arXiv:1607.06450)."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        norm = recomputed(functools.partial(_layer_norm, self.eps))
        return norm(x, self.scale[...], self.bias[...])


class GatedNorm(nnx.Module):
    """`RMSNorm(x silu(z))` over each of a few groups of channels, as in Mamba-2."""

    def __init__(self, width: int, eps: float, groups: int):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps, self.groups = eps, groups

    def __call__(self, x: Array, z: Array) -> Array:
        norm = recomputed(functools.partial(_gated_norm, self.eps, self.groups))
        return norm(x, z, self.scale[...])


def _rms_norm(eps: float, x: Array, scale: Array) -> Array:
    return (_over_rms(eps, x.astype(jnp.float32)) * scale).astype(x.dtype)


def _unscaled_norm(eps: float, x: Array) -> Array:
    return _over_rms(eps, x.astype(jnp.float32)).astype(x.dtype)


def _centred_norm(eps: float, x: Array, scale: Array) -> Array:
    return (_over_rms(eps, _centred(x)) * scale).astype(x.dtype)


def _layer_norm(eps: float, x: Array, scale: Array, bias: Array) -> Array:
    return (_over_rms(eps, _centred(x)) * scale + bias).astype(x.dtype)


def _gated_norm(eps: float, groups: int, x: Array, z: Array, scale: Array) -> Array:
    wide = x.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    apart = _over_rms(eps, wide.reshape(*x.shape[:-1], groups, -1))
    return (apart.reshape(x.shape) * scale).astype(x.dtype)


def _centred(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    return wide - jnp.mean(wide, axis=-1, keepdims=True)


def _over_rms(eps: float, wide: Array) -> Array:
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


NORMS: dict[str, type[nnx.Module]] = {
    "rms": RMSNorm,
    "layer": LayerNorm,
    "layer_no_bias": CentredNorm,
}
