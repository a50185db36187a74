"""Gated linear attention as a mixer: a decay for each channel of a key, from the input."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.nn.dense import dense, matrix
from lcm.nn.linear import LinearMixer, Projected
from lcm.nn.spec import LayerSpec
from lcm.types import Array

RANK = 16  # of the matrix that decays come from
SOFTNESS = 16.0  # by which their logarithms are divided, so that they begin near 1


class GLA(LinearMixer):
    """GLA (Yang et al., arXiv:2312.06635), equations 3 to 5.

    l_t = logsigmoid(u W_1 W_2 + b) / 16        by channel
    S_t = diag(exp(l_t)) S_{t-1} + k_t v_t^T    y_t = S_t^T q_t / sqrt N
    """

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        super().__init__(spec, rngs)
        channels = spec.heads * spec.state
        self.decay_down = matrix(rngs, spec.width, RANK)
        self.decay_up = matrix(rngs, RANK, channels)
        self.decay_bias = nnx.Param(jnp.zeros(channels))

    def mix(self, given: Projected) -> tuple[Array, Any]:
        decay = dense(dense(given.u_BLD, self.decay_down[...]), self.decay_up[...])
        decay = decay.astype(jnp.float32)
        decay = jax.nn.log_sigmoid(decay + self.decay_bias[...]) / SOFTNESS
        decay_BLHN = decay.reshape(*given.u_BLD.shape[:2], self.spec.heads, -1)
        q = given.q_BLGN * self.spec.state**-0.5
        return self.run(given, q, given.k_BLGN, given.v_BLHP, decay_BLHN, given.memory)

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        low = 2 * RANK * (spec.width + spec.heads * spec.state)
        return LinearMixer.flops(spec, length) + low
