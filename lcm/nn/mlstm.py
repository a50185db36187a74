"""The mLSTM as a mixer: a matrix with gates of input and forgetting that are exponentials."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.nn import interventions
from lcm.nn.dense import dense
from lcm.nn.linear import LinearMixer, Projected
from lcm.nn.maxima import log_maxima
from lcm.nn.norm import CentredNorm
from lcm.nn.retention import counted
from lcm.nn.spec import LayerSpec
from lcm.types import Array, Hidden

LEAST_M = -80.0  # of log-maxima, whose exponentials are finite
EPS = 1e-6


class MLSTM(LinearMixer):
    """mLSTM of xLSTM (Beck et al., arXiv:2405.04517), in the block of xLSTM-7B (arXiv:2503.13427).

        i_t, f_t = cap(u W_i + b_i), logsigmoid(cap(u W_f + b_f))     cap(x) = 15 tanh(x / 15)
        m_t = max(f_t + m_{t-1}, i_t)
        C_t = exp(f_t + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T
        n_t = the same with 1 for v_t
        y_t = C_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + 1e-6)        q_t over sqrt N
        out = (norm(y) sigmoid(u W_z)) W_out

    The maxima m are a recurrence of their own that knows nothing of chunks, so that C, n and m are
    the same whatever a chunk is. `cap=0` leaves gates as they are.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"cap": 15.0, "input_bias": -10.0}
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {"cap": (0.0, math.inf)}

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        super().__init__(spec, rngs)
        self.norm = CentredNorm((spec.heads, spec.head_size), spec.norm_eps)
        zeros = jnp.zeros((spec.width, spec.heads))
        self.i, self.f = nnx.Param(zeros), nnx.Param(zeros)
        self.i_bias = nnx.Param(jnp.full(spec.heads, spec.option("input_bias")))
        self.f_bias = nnx.Param(jnp.linspace(3.0, 6.0, spec.heads))

    def mix(self, given: Projected) -> tuple[Array, Any]:
        memory, reset_BL = given.memory, given.reset_BL
        i_BLH = given.there(self._preactivation("i", given.u_BLD), -jnp.inf)
        f_BLH = given.there(jax.nn.log_sigmoid(self._preactivation("f", given.u_BLD)))
        # Gates are scaled before the maxima, which are of what is written and kept.
        f_BLH, gain = interventions.scaled(self.spec.extension, f_BLH, given.context)
        i_BLH += jnp.log(gain)
        m_BLH, before_BLH = log_maxima(i_BLH, f_BLH, memory["m"], reset_BL, LEAST_M)
        decay_BLH = jnp.where(reset_BL[..., None], 0, f_BLH + before_BLH - m_BLH)
        # Of the values, which heads do not share, and as 0 of padding.
        write_BLH1 = jnp.exp(i_BLH - m_BLH)[..., None]
        v = (counted(given).astype(jnp.float32) * write_BLH1).astype(given.v_BLHP.dtype)
        q = given.q_BLGN * self.spec.state**-0.5
        alone = self.spec.extension.alone
        y_BLHP, C_BHNP = self.run(
            given, q, given.k_BLGN, v, decay_BLH, memory["C"], extension=alone
        )
        y_BLHP = y_BLHP.astype(jnp.float32)
        floor = jnp.maximum(jnp.abs(y_BLHP[..., -1:]), jnp.exp(-m_BLH)[..., None])
        y_BLHP = (y_BLHP[..., :-1] / (floor + EPS)).astype(v.dtype)
        return y_BLHP, {"C": C_BHNP, "m": m_BLH[:, -1]}

    def _preactivation(self, name: str, u_BLD: Hidden) -> Array:
        cap = self.spec.option("cap")
        x_BLH = dense(u_BLD, getattr(self, name)[...]).astype(jnp.float32)
        x_BLH += getattr(self, f"{name}_bias")[...]
        return cap * jnp.tanh(x_BLH / cap) if cap else x_BLH

    def gated(self, y_BLHP: Array, u_BLD: Hidden) -> Array:
        return self.opened(y_BLHP, jax.nn.sigmoid(dense(u_BLD, self.z[...])))

    @staticmethod
    def memory(spec: LayerSpec) -> Any:
        return {"C": (spec.heads, spec.state, spec.head_size + 1), "m": (spec.heads,)}

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        return LinearMixer.flops(spec, length) + 4 * spec.width * spec.heads
