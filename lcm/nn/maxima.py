"""Running maxima of logarithms, by which sums of exponentials stay in the range of float32."""

import jax.numpy as jnp

from lcm.ops.recurrence import op_max
from lcm.types import Array

NEVER = -1e30  # the maximum before the first token


def log_maxima(
    i_BLH: Array, f_BLH: Array, m0_BH: Array, reset_BL: Array, least: float
) -> tuple[Array, Array]:
    """`m_t = max(f_t + m_{t-1}, i_t)`, or `least` where it is less, and `m_{t-1}`.

    Of a sum in units of `exp(m_t)`, with log-decays f, neither what is written, `exp(i_t - m_t)`,
    nor what is kept, `exp(f_t + m_{t-1} - m_t)`, is above 1. It is the same sum in any units, so
    that the maxima need no gradient; but `m_0` is of what is given.
    """
    m_BLH, _ = op_max(i_BLH, f_BLH, m0_BH, reset_BL)
    m_BLH = jnp.maximum(m_BLH, least)
    return m_BLH, jnp.concatenate([m0_BH[:, None], m_BLH[:, :-1]], 1)
