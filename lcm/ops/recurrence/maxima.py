"""`m_t = max(f_t + m_{t-1}, i_t)`, elementwise: the recurrence of running maxima."""

import jax
import jax.numpy as jnp

from lcm.types import Array


def op_max(i: Array, f: Array, m0: Array, reset_BL: Array) -> tuple[Array, Array]:
    """All maxima `m_t` and the last one, of `i` and `f` `[B, L, ...]`; they have no gradient.

    It is linear where a sum is a maximum and a product is a sum, and so is scanned as `op_diag` is.

    m0: the maximum before, `[B, ...]`.
    reset_BL: bool, where a document begins: there `m_t = i_t`.
    """
    i, f, m0 = jax.lax.stop_gradient((i, f, m0))
    moved, alone = from_nothing(i, f, reset_BL)
    m = jnp.maximum(moved + m0[:, None], alone)
    return m, m[:, -1]


def from_nothing(i: Array, f: Array, reset_BL: Array) -> tuple[Array, Array]:
    """What is added to the maximum before the first token, `-inf` in later documents, and the
    maxima without it."""
    f = jnp.where(reset_BL.reshape(*reset_BL.shape, *[1] * (f.ndim - 2)), -jnp.inf, f)

    def after(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        (f1, i1), (f2, i2) = first, second
        return f1 + f2, jnp.maximum(i1 + f2, i2)

    return jax.lax.associative_scan(after, (f, i), axis=1)
