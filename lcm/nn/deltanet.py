"""The delta rule as a mixer: what is written replaces what its key had, not adds to it."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.nn import interventions
from lcm.nn.dense import dense, matrix
from lcm.nn.linear import LinearMixer, Projected
from lcm.nn.norm import RMSNorm
from lcm.nn.recurrent import step_biases
from lcm.nn.spec import LayerSpec
from lcm.ops.recurrence.reference import by_head
from lcm.types import Array, Context, Hidden

RANK = 128  # of KDA's decays and gate, at the most, if nothing is said


class DeltaNet(LinearMixer):
    """DeltaNet (Yang et al., arXiv:2406.06484), with q and k of length 1.

        beta_t = sigmoid(u W_b)                    twice that with `negative=True`
        S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T       y_t = S_t^T q_t / sqrt N

    Then `I - beta k k^T` may have negative eigenvalues, with which states can be tracked (Grazzi et
    al., arXiv:2411.12537).
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"negative": False}
    convolves = True
    EXTENDS = interventions.LINEAR - {"window"}  # what is erased depends on what is there

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        super().__init__(spec, rngs)
        self.beta = matrix(rngs, spec.width, spec.heads)

    def mix(self, given: Projected) -> tuple[Array, Any]:
        beta_BLH = jax.nn.sigmoid(dense(given.u_BLD, self.beta[...]).astype(jnp.float32))
        beta_BLH = given.there(beta_BLH * (1 + self.spec.option("negative")))
        decay = self.log_decay(given.u_BLD)  # [B, L, H], or by channel [B, L, H, N]
        q, k = (normalised(x) for x in (given.q_BLGN, given.k_BLGN))
        # The decay comes before the erasure, which thus finds exp(l)^T S: on the side that reads
        # for each channel, and in the rate of a head that has one, where keys stay as they are.
        if decay.ndim == 4:
            k_BLHN = by_head(k, self.spec.heads, 2).astype(jnp.float32)
            erase = jnp.exp(decay) * k_BLHN, -beta_BLH[..., None] * k_BLHN
        else:
            erase = k, k, -beta_BLH * jnp.exp(decay)
        v = (given.v_BLHP * beta_BLH[..., None]).astype(given.v_BLHP.dtype)
        return self.run(given, q * self.spec.state**-0.5, k, v, decay, given.memory, erase)

    def log_decay(self, u_BLD: Hidden) -> Array:
        """None: the rule itself is what forgets."""
        return jnp.zeros((*u_BLD.shape[:2], self.spec.heads))

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        erased = 2 * spec.inner * spec.state
        return LinearMixer.flops(spec, length) + 2 * spec.width * spec.heads + erased


class Gated(DeltaNet):
    """What the delta rules with a decay share."""

    EXTENDS = interventions.ALL - {"window"}

    def importance(self, u_BLD: Hidden, context: Context) -> Array:
        """The norm of a token's log-decays, in place of the steps of Mamba, `[B, L]`."""
        log_decay = self.log_decay(u_BLD)
        return jnp.linalg.norm(log_decay.reshape(*log_decay.shape[:2], -1), axis=-1)


class GatedDeltaNet(Gated):
    """Gated DeltaNet (Yang et al., arXiv:2412.06464), the linear layer of Qwen3-Next.

    l_t = -exp(A_log) softplus(u W_a + dt_bias)                   a number a head
    S_t = exp(l_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T

    Option `eps` is that of the norm of y, 0 for the model's `norm_eps`: OLMo-Hybrid has two.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {**DeltaNet.OPTIONS, "eps": 0.0}
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {"eps": (0.0, 1.0)}

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        super().__init__(spec, rngs)
        self.norm = RMSNorm(spec.head_size, spec.option("eps") or spec.norm_eps)
        self.a = matrix(rngs, spec.width, spec.heads)
        self.A_log = decays(rngs, spec.heads, 0.0)
        self.dt_bias = step_biases(rngs, spec.heads)

    def log_decay(self, u_BLD: Hidden) -> Array:
        dt_BLH = dense(u_BLD, self.a[...]).astype(jnp.float32) + self.dt_bias[...]
        return -interventions.rate(self.spec.extension, self.A_log[...]) * jax.nn.softplus(dt_BLH)

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        return DeltaNet.flops(spec, length) + 2 * spec.width * spec.heads


class KDA(Gated):
    """Kimi delta attention (Kimi team, arXiv:2510.26692): Gated DeltaNet's decay by channel.

    l_t = -exp(A_log) softplus(u W_1 W_2 + dt_bias)               a number a channel of a head
    S_t = (I - beta_t k_t k_t^T) diag(exp(l_t)) S_{t-1} + beta_t k_t v_t^T

    The gate of the output is a sigmoid, of a matrix of low rank as well. Option `rank` is that of
    both, 0 for the width, at most 128; Kimi Linear has the size of a head, which is 128 too.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {**DeltaNet.OPTIONS, "rank": 0}
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {"rank": (0, 2**20)}

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        super().__init__(spec, rngs)
        rank, channels = _rank(spec), spec.heads * spec.state
        self.decay_down = matrix(rngs, spec.width, rank)
        self.decay_up = matrix(rngs, rank, channels)
        self.A_log = decays(rngs, spec.heads, 1.0)
        self.dt_bias = step_biases(rngs, channels)
        del self.z
        self.gate_down = matrix(rngs, spec.width, rank)
        self.gate_up = matrix(rngs, rank, spec.inner)

    def log_decay(self, u_BLD: Hidden) -> Array:
        dt = dense(dense(u_BLD, self.decay_down[...]), self.decay_up[...]).astype(jnp.float32)
        dt_BLHN = (dt + self.dt_bias[...]).reshape(*u_BLD.shape[:2], self.spec.heads, -1)
        rate_H = interventions.rate(self.spec.extension, self.A_log[...])
        return -rate_H[:, None] * jax.nn.softplus(dt_BLHN)

    def gated(self, y_BLHP: Array, u_BLD: Hidden) -> Array:
        gate = dense(dense(u_BLD, self.gate_down[...]), self.gate_up[...])
        return self.opened(y_BLHP, jax.nn.sigmoid(gate))

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        low = 2 * spec.width + spec.heads * spec.state + spec.inner
        full = 2 * spec.width * spec.inner
        return DeltaNet.flops(spec, length) - full + 2 * _rank(spec) * low


def _rank(spec: LayerSpec) -> int:
    return spec.option("rank") or min(RANK, spec.width)


def normalised(x: Array) -> Array:
    """Vectors of length 1 along the last axis, float32 within."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt((wide**2).sum(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def decays(rngs: nnx.Rngs, heads: int, least: float) -> nnx.Param:
    """A_log of heads, A being uniform from `least`, not under 0.01, to 16."""
    A = jax.random.uniform(rngs.params(), (heads,), minval=least, maxval=16)
    return nnx.Param(jnp.log(jnp.maximum(A, 0.01)))
