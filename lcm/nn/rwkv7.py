"""The time mixing of RWKV-7: a delta rule with a decay and a rate of learning for each channel."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
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
from lcm.types import Array, Context, Hidden

STEEPEST = float(np.exp(-0.5))  # the most by which a log-decay falls in a token
NORM_FLOOR = 1e-12
# What ranks of the small matrices grow with, in units of sqrt(D).
RANKS = {"decay": 2.5, "rate": 2.5, "value": 1.7, "gate": 5.0}


class RWKV7(TimeMix):
    """RWKV-7 "Goose" (Peng et al., arXiv:2503.14456), of H heads with a state `[N, P]` each.

        x_s = x + (x_{t-1} - x) mix_s                             s in r, w, k, v, a, g
        l = -exp(-1/2) sigmoid(w0 + tanh(x_w W_1) W_2)            log-decay, by channel
        a = sigmoid(a0 + x_a A_1 A_2)                             rate of learning, by channel
        kappa = unit(k erase_scale),  k' = k (1 + (a - 1) key_rate)
        v = v + (v_first - v) sigmoid(v0 + x_v V_1 V_2)
        S_t = diag(exp(l)) S_{t-1} - (a kappa) (kappa^T S_{t-1}) + k' v^T
        out = ((norm(S_t^T r) + (r . (k' bonus)) v) (sigmoid(x_g G_1) G_2)) W_out

    v_first are the values of the model's first layer, if that is such a layer as well: it hands
    them on (`first_values`); without, or in that layer, v stays as it is. Its releases have H P =
    D and N = P = 64; they need `model.norm=layer` and a norm of the embeddings. Options
    `decay_rank` and so on are ranks of the small matrices, which 0 derives from the width.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {f"{name}_rank": 0 for name in RANKS}
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {f"{n}_rank": (0, 2**16) for n in RANKS}

    EXTENDS = interventions.LINEAR - {"window"}  # what is erased depends on what is there

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, width, inner = spec, spec.width, spec.inner
        keys, place = spec.heads * spec.state, ramp(spec.heads * spec.state)
        set_initial(self, self.initial(spec, MIDDLE))
        self.r = orthogonal(rngs, width, keys)
        self.k = orthogonal(rngs, width, keys, 0.1)
        self.v = orthogonal(rngs, width, inner)
        self.out = zeros(inner, width)
        for name, out in (("decay", keys), ("rate", keys), ("value", inner), ("gate", inner)):
            rank = rank_of(spec, name)
            setattr(self, f"{name}_down", zeros(width, rank))
            setattr(self, f"{name}_up", orthogonal(rngs, rank, out, 0.1))
        self.gate_down = orthogonal(rngs, width, rank_of(spec, "gate"), 0.1)  # or all would be shut
        zigzag = _zigzag(spec)
        self.rate_bias = nnx.Param(-0.19 + 0.3 * zigzag + 0.4 * (place - 0.5))
        self.value_bias = nnx.Param(0.73 - 0.4 * (ramp(inner) - 0.5))
        self.erase_scale = nnx.Param(0.71 - 0.1 * (place - 0.5))
        self.key_rate = nnx.Param(jnp.full(keys, 1.02))
        self.bonus = nnx.Param(jnp.full((spec.heads, spec.state), -0.04))
        self.head_norm = LayerNorm((spec.heads, spec.head_size), NORM_EPS)

    @staticmethod
    def initial(spec: LayerSpec, at: Place) -> dict[str, Array]:
        """Initial values that depend on the layer, by parameter."""
        powers = zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True)
        values = {f"mix_{n}": mix(spec.width, power * (1 - at.start)) for n, power in powers}
        decay = 6 * ramp(spec.heads * spec.state) ** (1 + at.share**0.3)
        values["decay_bias"] = -5.5 + decay + 2.5 * _zigzag(spec)
        return values

    def __call__(
        self, u_BLD: Hidden, context: Context, state: RecurrentState | None, shared: dict
    ) -> tuple[Hidden, RecurrentState | None]:
        spec = self.spec
        before, reset_BL, there_BL = entered(state, self.init_state(spec, len(u_BLD)), context)
        last_BLD, tail = moved(u_BLD, before.tails[0], reset_BL, there_BL)
        x = {n: mixed(u_BLD, last_BLD - u_BLD, getattr(self, f"mix_{n}")[...]) for n in "rwkvag"}
        there = there_BL[..., None]
        r_BLHN = self.by_head(dense(x["r"], self.r[...]))
        k, kappa, rate = self._keys(x["k"], x["a"])
        v_BLHP = self.by_head(self._values(x["v"], shared))
        k, v, rate = (jnp.where(there[..., None], y, 0) for y in (k, v_BLHP, rate))
        decay = self._small("decay", jnp.tanh, x["w"]) + self.decay_bias[...]
        decay_BLHN = self.by_head(jnp.where(there, -STEEPEST * jax.nn.sigmoid(decay), 0))
        y_BLHP, S_BHNP = interventions.matrix(
            spec.extension,
            context,
            r_BLHN,
            k,
            v,
            decay_BLHN,
            (-kappa, kappa * rate),
            before.memory,
            reset_BL,
            spec.recurrence_chunk,
        )
        known_BLH = (r_BLHN * k * self.bonus[...].astype(k.dtype)).sum(-1, keepdims=True)
        y_BLHP = self.head_norm(y_BLHP) + known_BLH * v_BLHP
        gate_BLE = dense(jax.nn.sigmoid(dense(x["g"], self.gate_down[...])), self.gate_up[...])
        out_BLD = dense(y_BLHP.reshape(gate_BLE.shape) * gate_BLE, self.out[...])
        after = RecurrentState(S_BHNP, (tail,), before.segment_B)
        return out_BLD, None if state is None else after

    def first_values(self, u_BLD: Hidden, context: Context, state: RecurrentState | None) -> Array:
        """The values `[B, L, E]` that a first layer hands on to all others."""
        before, *where = entered(state, self.init_state(self.spec, len(u_BLD)), context)
        last_BLD, _ = moved(u_BLD, before.tails[0], *where)
        return dense(mixed(u_BLD, last_BLD - u_BLD, self.mix_v[...]), self.v[...])

    def _keys(self, x_k_BLD: Hidden, x_a_BLD: Hidden) -> tuple[Array, Array, Array]:
        """What is written, what is erased, and the rate of it, `[B, L, H, N]`."""
        k = dense(x_k_BLD, self.k[...])
        rate = jax.nn.sigmoid(self._small("rate", lambda x: x, x_a_BLD) + self.rate_bias[...])
        kappa = self.by_head(k.astype(jnp.float32) * self.erase_scale[...])
        norm = jnp.sqrt(jnp.maximum((kappa**2).sum(-1, keepdims=True), NORM_FLOOR**2))
        written = k * (1 + (rate - 1) * self.key_rate[...]).astype(k.dtype)
        return self.by_head(written), kappa / norm, self.by_head(rate)

    def _values(self, x_v_BLD: Hidden, shared: dict) -> Array:
        v_BLE = dense(x_v_BLD, self.v[...])
        if "values" not in shared:
            return v_BLE
        share = jax.nn.sigmoid(self._small("value", lambda x: x, x_v_BLD) + self.value_bias[...])
        return v_BLE + (shared["values"] - v_BLE) * share.astype(v_BLE.dtype)

    def _small(self, name: str, between, x_BLD: Hidden) -> Array:
        """A product with two matrices of low rank, float32."""
        low = between(dense(x_BLD, getattr(self, f"{name}_down")[...]))
        return dense(low, getattr(self, f"{name}_up")[...]).astype(jnp.float32)

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass: projections; the state erased, written, read"""
        keys, inner = spec.heads * spec.state, spec.inner
        small = sum(
            rank_of(spec, name) * (spec.width + out)
            for name, out in (("decay", keys), ("rate", keys), ("value", inner), ("gate", inner))
        )
        return 2 * (2 * spec.width * (keys + inner) + small) + 6 * inner * spec.state


def rank_of(spec: LayerSpec, name: str) -> int:
    """The rank of a small matrix: that of its option, or a multiple of 32."""
    if given := spec.option(f"{name}_rank"):
        return given
    size = RANKS[name] * spec.width**0.5 * spec.state / 64
    return max(32, round(size / 32) * 32)


def _zigzag(spec: LayerSpec) -> Array:
    """Across each head from -1 to 1, flat in the middle."""
    z = 2 * ramp(spec.state) - 1
    return jnp.tile(z * jnp.abs(z), spec.heads)
