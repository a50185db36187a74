"""The recurrences on kernels: which of them there are, and arrays laid out as they take them."""

import jax.numpy as jnp

from lcm.ops.recurrence.pallas import diagonal as of_vectors
from lcm.ops.recurrence.pallas import plan
from lcm.ops.recurrence.pallas.mesh import over_mesh
from lcm.types import Array


def diagonal_fits(a: Array, b: Array) -> bool:
    """Whether `diagonal` is to be used: for a TPU, of real numbers and more than one token."""
    real = not (jnp.iscomplexobj(a) or jnp.iscomplexobj(b))
    return plan.here() and real and b.shape[1] > 1 and b.size > 0


def diagonal(a: Array, b: Array, h0: Array) -> Array:
    """All states of `h_t = a_t h_{t-1} + b_t`, float32 `[B, L, ...]`; rows and channels of each
    device under a mesh."""

    def run(a: Array, b: Array, h0: Array) -> Array:
        flat = (*b.shape[:2], -1)
        h = of_vectors.states(a.reshape(flat), b.reshape(flat), h0.reshape(flat[0], -1))
        return h.reshape(b.shape)

    channels = 2 if b.ndim > 2 else None
    return over_mesh(run, (channels, channels, channels and 1), channels, a, b, h0)
