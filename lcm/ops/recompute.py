"""Keeping the arguments of a function for its backward pass instead of what it computes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lcm.ops.platform import platform
from lcm.types import Array


def recomputed(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` with a backward pass that starts from its arguments, the first one an activation.

    `jax.checkpoint` keeps as little, but XLA for CPUs drops its barriers before it orders the
    operations, computes every layer's second forward pass before the first gradient, and holds
    them all.
    """

    @jax.custom_vjp
    def call(*args: Array) -> Array:
        return function(*args)

    def forward(*args: Array) -> tuple[Array, tuple[Array, ...]]:
        return function(*args), args

    def backward(args: tuple[Array, ...], d_out: Array) -> tuple[Array, ...]:
        first, *rest = args
        return jax.vjp(function, after(first, d_out), *rest)[1](d_out)

    call.defvjp(forward, backward)
    return call


def after(x: Array, gradient: Array) -> Array:
    """`x`, for use no earlier than `gradient` is known; NaN where the first of its numbers is.

    On a CPU only a dependence of values lasts until operations are ordered; elsewhere a barrier
    does, and needs no number of one device on all.
    """
    if platform() != "cpu":
        return jax.lax.optimization_barrier((x, gradient))[0]
    first = gradient[(0,) * gradient.ndim]
    return x + jnp.where(first == first, 0.0, first).astype(x.dtype)
