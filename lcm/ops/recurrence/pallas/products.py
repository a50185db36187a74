"""Products of the kernels for matrices: summed in float32, and exact for what is float32."""

import jax
import jax.numpy as jnp

from lcm.types import Array


def dot(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    """A product over one axis of each, summed in float32, and exact in it."""
    if x.dtype != y.dtype:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jax.lax.dot_general(
        x,
        y,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def wide_dot(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    """The same of what touches a state, where one of them may be bfloat16.

    A float32 is the sum of three bfloat16, so three products do for what two float32 need six.
    """
    if x.dtype == y.dtype:
        return dot(x, y, axes)
    if x.dtype == jnp.float32:
        return sum(dot(part, y, axes) for part in _thirds(x))
    return sum(dot(x, part, axes) for part in _thirds(y))


def transposed(x: Array) -> Array:
    """The transpose, through registers of 32 bits."""
    return x.astype(jnp.float32).T.astype(x.dtype)


def _thirds(x: Array) -> list[Array]:
    """Its first, second and third eight digits."""
    parts = []
    for _ in range(3):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    return parts[::-1]
