"""Running maxima of logarithms, by which sums of exponentials stay in the range of float32."""

import jax
import jax.numpy as jnp

from lcm.types import Array

NEVER = -1e30  # the maximum before the first token


def log_maxima(
    i_BLH: Array, f_BLH: Array, m0_BH: Array, reset_BL: Array, least: float
) -> tuple[Array, Array]:
    """`m_t = max(f_t + m_{t-1}, i_t)` and `m_{t-1}`; `i_t` where documents begin.

    Nothing of a sum in units of `exp(m_t)` is above 1: neither what is written, `exp(i_t - m_t)`,
    nor what is kept, `exp(f_t + m_{t-1} - m_t)`, of log-decays f. Such a sum of any m is the same,
    so the maxima have no gradient.

    least: below which no maximum is.
    """
    f_BLH = jnp.where(reset_BL[..., None], -jnp.inf, f_BLH)

    def after(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        (f1, i1), (f2, i2) = first, second
        return f1 + f2, jnp.maximum(i1 + f2, i2)

    f, i = jax.lax.associative_scan(after, jax.lax.stop_gradient((f_BLH, i_BLH)), axis=1)
    m_BLH = jnp.maximum(jnp.maximum(f + m0_BH[:, None], i), least)
    m_BLH = jax.lax.stop_gradient(m_BLH)
    return m_BLH, jnp.concatenate([m0_BH[:, None], m_BLH[:, :-1]], 1)
