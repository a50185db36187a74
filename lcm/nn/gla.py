"""Gated linear attention as a mixer: a decay for each channel of a key, from the input."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.nn.dense import dense, matrix
from lcm.nn.linear import LinearMixer
from lcm.nn.spec import LayerSpec
from lcm.types import Array, Context, Hidden

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

    def mix(
        self,
        u_BLD: Hidden,
        q_BLGN: Array,
        k_BLGN: Array,
        v_BLHP: Array,
        memory: Any,
        reset_BL: Array,
        context: Context,
    ) -> tuple[Array, Any]:
        decay = dense(dense(u_BLD, self.decay_down[...]), self.decay_up[...]).astype(jnp.float32)
        decay = jax.nn.log_sigmoid(decay + self.decay_bias[...]) / SOFTNESS
        decay_BLHN = decay.reshape(*u_BLD.shape[:2], self.spec.heads, -1)
        decay_BLHN = jnp.where(context.segments_BL[..., None, None] > 0, decay_BLHN, 0)
        q = q_BLGN * self.spec.state**-0.5
        return self.run(q, k_BLGN, v_BLHP, decay_BLHN, memory, reset_BL)

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        low = 2 * RANK * (spec.width + spec.heads * spec.state)
        return LinearMixer.flops(spec, length) + low
