"""The time mixing of RWKV-6: what is mixed of two tokens, and decays, depend on the input."""

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.nn import interventions
from lcm.nn.dense import dense, orthogonal
from lcm.nn.norm import LayerNorm
from lcm.nn.recurrent import RecurrentState, entered, moved
from lcm.nn.rwkv import (
    MIDDLE,
    NORM_EPS,
    Place,
    TimeMix,
    mix,
    mixed,
    ramp,
    set_initial,
    zeros,
)
from lcm.nn.spec import LayerSpec
from lcm.ops.recurrence import op_matrix_before
from lcm.types import Array, Context, Hidden

NAMES = "wkvrg"


def ranks(width: int) -> tuple[int, int]:
    """Of the small matrices for what is mixed and for decays, as releases of a width have them."""
    return (64, 128) if width >= 4096 else (32, 64)


class RWKV6(TimeMix):
    """RWKV-6 "Finch" (Peng et al., arXiv:2404.05892), of H heads with a state `[N, P]` each.

        dx = x_{t-1} - x,  p = x + dx mix_x,  m_s = tanh(p M_1)_s M_2s
        x_s = x + dx (mix_s + m_s)                                s in w, k, v, r, g
        l = -exp(w0 + tanh(x_w W_1) W_2)                          log-decay, by channel
        y_t = S_{t-1}^T r + (r . (bonus k)) v                     before the token is written
        S_t = diag(exp(l)) S_{t-1} + k v^T
        out = (norm(y) silu(x_g W_g)) W_out                       norm by head

    Its releases have H P = D and N = P = 64; they need `model.norm=layer` and a norm of the
    embeddings.
    """

    EXTENDS = interventions.LINEAR

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, width, inner = spec, spec.width, spec.inner
        keys = spec.heads * spec.state
        mix_rank, decay_rank = ranks(width)
        set_initial(self, self.initial(spec, MIDDLE))
        self.mix_down = zeros(width, len(NAMES) * mix_rank)
        self.mix_up = _small_values(rngs, len(NAMES), mix_rank, width)
        self.decay_down = zeros(width, decay_rank)
        self.decay_up = _small_values(rngs, decay_rank, keys)
        self.r = orthogonal(rngs, width, keys)
        self.k = orthogonal(rngs, width, keys, 0.1)
        self.v = orthogonal(rngs, width, inner)
        self.g = orthogonal(rngs, width, inner, 0.1)
        self.out = zeros(inner, width)
        self.head_norm = LayerNorm((spec.heads, spec.head_size), NORM_EPS)

    @staticmethod
    def initial(spec: LayerSpec, at: Place) -> dict[str, Array]:
        """Initial values that depend on the layer, by parameter."""
        keys = spec.heads * spec.state
        powers = zip("xwkvrg", (1, 1, 1, 1, 0.5, 0.5), strict=True)
        values = {f"mix_{n}": mix(spec.width, power * (1 - at.start)) for n, power in powers}
        values["mix_v"] -= 0.3 * at.share
        wave = (jnp.arange(1, keys + 1) % 3 - 1) * 0.1
        bonus = at.share * (1 - ramp(keys)) + wave
        values["bonus"] = bonus.reshape(spec.heads, spec.state)
        values["decay_bias"] = -6 + 5 * ramp(keys) ** (0.7 + 1.3 * at.share)
        return values

    def __call__(
        self, u_BLD: Hidden, context: Context, state: RecurrentState | None, shared: dict
    ) -> tuple[Hidden, RecurrentState | None]:
        spec = self.spec
        before, reset_BL, there_BL = entered(state, self.init_state(spec, len(u_BLD)), context)
        last_BLD, tail = moved(u_BLD, before.tails[0], reset_BL, there_BL)
        x = self._mixed(u_BLD, last_BLD - u_BLD)
        r, k, v = (self.by_head(dense(x[name], getattr(self, name)[...])) for name in "rkv")
        there = there_BL[..., None]
        decay = dense(jnp.tanh(dense(x["w"], self.decay_down[...])), self.decay_up[...])
        decay = -jnp.exp(decay.astype(jnp.float32) + self.decay_bias[...])
        y_BLHP, S_BHNP = interventions.matrix(
            spec.extension,
            context,
            r,
            jnp.where(there[..., None], k, 0),
            v,
            self.by_head(jnp.where(there, decay, 0)),
            None,
            before.memory,
            reset_BL,
            spec.recurrence_chunk,
            op_matrix_before,
        )
        y_BLHP += (r * self.bonus[...].astype(k.dtype) * k).sum(-1, keepdims=True) * v
        gate_BLE = jax.nn.silu(dense(x["g"], self.g[...]))
        y_BLE = self.head_norm(y_BLHP).reshape(gate_BLE.shape)
        out_BLD = dense(y_BLE * gate_BLE, self.out[...])
        after = RecurrentState(S_BHNP, (tail,), before.segment_B)
        return out_BLD, None if state is None else after

    def _mixed(self, u_BLD: Hidden, dx_BLD: Hidden) -> dict[str, Hidden]:
        """What each projection reads, the shares of both tokens depending on the input."""
        low = jnp.tanh(dense(mixed(u_BLD, dx_BLD, self.mix_x[...]), self.mix_down[...]))
        shares = {}
        for name, z, up in zip(
            NAMES, jnp.split(low, len(NAMES), -1), self.mix_up[...], strict=True
        ):
            shares[name] = getattr(self, f"mix_{name}")[...].astype(z.dtype) + dense(z, up)
        return {name: mixed(u_BLD, dx_BLD, share) for name, share in shares.items()}

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass: projections; the state written and read."""
        keys, inner = spec.heads * spec.state, spec.inner
        mix_rank, decay_rank = ranks(spec.width)
        small = 2 * len(NAMES) * mix_rank * spec.width + decay_rank * (spec.width + keys)
        return 2 * (spec.width * (2 * keys + 3 * inner) + small) + 4 * inner * spec.state


def _small_values(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    """Within 0.01 of 0."""
    return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-0.01, maxval=0.01))
