"""The time mixing of RWKV-4: a mean of values by channel, whose weights decay at learned rates."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.nn import interventions
from lcm.nn.dense import dense, orthogonal
from lcm.nn.maxima import NEVER, log_maxima
from lcm.nn.recurrent import RecurrentMixer, RecurrentState, empty, entered, moved
from lcm.nn.rwkv import MIDDLE, Place, mix, mixed, ramp, set_initial, zeros
from lcm.nn.spec import LayerSpec
from lcm.ops.recurrence import op_diag
from lcm.types import Array, Context, Hidden


class Sums(NamedTuple):
    """Sums over tokens, `[B, ..., E]`, in units of `exp(m)`: of weights times values, of weights.

    m is the largest logarithm of a weight in them, so that `den` is at least 1 where there are any.
    """

    m: Array
    num: Array
    den: Array


NOTHING = Sums(NEVER, 0.0, 0.0)


class RWKV4(RecurrentMixer):
    """RWKV-4 "Dove" (Peng et al., arXiv:2305.13048, section 3), of E = expand D channels.

        x_s = x + (x_{t-1} - x) mix_s                             s in r, k, v
        r, k, v = x_r W_r, x_k W_k, x_v W_v
        wkv_t = (sum_{i<t} e^(k_i - (t-1-i) w) v_i + e^(bonus + k_t) v_t) / (the same of 1 for v)
        out = (sigmoid(r) wkv) W_out                              w = exp(A_log)

    Keys may be of any size: sums are kept in units of the largest weight. The paper's mix is
    1 - mix_s, the share of the token itself. Its releases have E = D; they need `model.norm=layer`
    with an epsilon of 1e-5 and a norm of the embeddings.
    """

    EXTENDS = interventions.ALL

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, width, inner = spec, spec.width, spec.inner
        set_initial(self, self.initial(spec, MIDDLE))
        self.r, self.k = zeros(width, inner), zeros(width, inner)
        self.v = orthogonal(rngs, width, inner)
        self.out = zeros(inner, width)

    @staticmethod
    def initial(spec: LayerSpec, at: Place) -> dict[str, Array]:
        """Initial values that depend on the layer, by parameter, as the authors' code has them.

        Transformers begins with a bonus of 1 in all channels.
        """
        powers = zip("kvr", (1, 1, 0.5), strict=True)
        values = {f"mix_{n}": mix(spec.width, power * (1 - at.start)) for n, power in powers}
        values["mix_v"] -= 0.3 * at.share
        values["A_log"] = -5 + 8 * ramp(spec.inner) ** (0.7 + 1.3 * at.share)
        values["bonus"] = math.log(0.3) + 0.5 * (jnp.arange(1, spec.inner + 1) % 3 - 1)
        return values

    def __call__(
        self, u_BLD: Hidden, context: Context, state: RecurrentState | None, shared: dict
    ) -> tuple[Hidden, RecurrentState | None]:
        before, reset_BL, there_BL = entered(state, self.init_state(self.spec, len(u_BLD)), context)
        last_BLD, tail = moved(u_BLD, before.tails[0], reset_BL, there_BL)
        dx_BLD = last_BLD - u_BLD
        r_BLE, k_BLE, v_BLE = (
            dense(mixed(u_BLD, dx_BLD, getattr(self, f"mix_{name}")[...]), getattr(self, name)[...])
            for name in "rkv"
        )
        k_BLE, v_BLE = k_BLE.astype(jnp.float32), v_BLE.astype(jnp.float32)
        past, memory = self._past(k_BLE, v_BLE, before.memory, context, reset_BL, there_BL)
        y_BLE = _mean(past, self.bonus[...] + k_BLE, v_BLE).astype(u_BLD.dtype)
        out_BLD = dense(jax.nn.sigmoid(r_BLE) * y_BLE, self.out[...])
        after = RecurrentState(memory, (tail,), before.segment_B)
        return out_BLD, None if state is None else after

    def _past(
        self,
        k_BLE: Array,
        v_BLE: Array,
        memory: dict[str, Array],
        context: Context,
        reset_BL: Array,
        there_BL: Array,
    ) -> tuple[Sums, dict[str, Array]]:
        """The sums that each token finds, of those before it in its document, and the last ones."""
        own, there_BL1 = self.spec.extension, there_BL[..., None]
        f_BLE = jnp.where(there_BL1, -interventions.rate(own, self.A_log[...]), 0)
        f_BLE, gain = interventions.scaled(own, f_BLE, context)
        i_BLE = jnp.where(there_BL1, k_BLE, -jnp.inf) + jnp.log(gain)
        first = _begun(memory)
        if own.cuts(k_BLE.shape[1]):
            after = _windowed(i_BLE, f_BLE, v_BLE, reset_BL, own.window)
        else:
            after = _summed(i_BLE, f_BLE, v_BLE, first, reset_BL, self.spec.recurrence_chunk)
        past = jax.tree.map(lambda x, y: jnp.concatenate([x[:, None], y[:, :-1]], 1), first, after)
        past = jax.tree.map(lambda x, none: jnp.where(reset_BL[..., None], none, x), past, NOTHING)
        m, num, den = (x[:, -1] for x in after)
        return past, {"m": jnp.where(den > 0, m, 0), "num": num, "den": den}

    @staticmethod
    def init_state(
        spec: LayerSpec, batch: int, length: int = 0, dtype: jnp.dtype | None = None, chunk: int = 0
    ) -> RecurrentState:
        """The empty state, float32 whatever the dtype of caches, for any length.

        Its `m` is kept as 0 where `den` is 0: no token has been seen.
        """
        return empty(batch, dict.fromkeys(Sums._fields, (spec.inner,)), (spec.width,), 2)

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass: four projections."""
        return 8 * spec.width * spec.inner


def _begun(memory: dict[str, Array]) -> Sums:
    """The sums of a state; none where it has seen nothing, or was drawn where no sum can be."""
    seen = memory["den"] > 0
    return jax.tree.map(lambda x, none: jnp.where(seen, x, none), Sums(**memory), NOTHING)


def _summed(
    i_BLE: Array, f_BLE: Array, v_BLE: Array, first: Sums, reset_BL: Array, chunk: int
) -> Sums:
    """The sums after each token, of logarithms i of weights and of decays f; 0 where `i = -inf`."""
    m_BLE, before_BLE = log_maxima(i_BLE, f_BLE, first.m, reset_BL, NEVER)
    a_BLE = jnp.exp(jnp.where(reset_BL[..., None], 0, f_BLE + before_BLE - m_BLE))
    write_BLE = jnp.exp(i_BLE - m_BLE)
    both = [jnp.concatenate(pair, -1) for pair in ((a_BLE, a_BLE), (write_BLE * v_BLE, write_BLE))]
    h0 = jnp.concatenate([first.num, first.den], -1)
    h, _ = op_diag(*both, h0, reset_BL, chunk=chunk)
    return Sums(m_BLE, *jnp.split(h, 2, -1))


def _windowed(i_BLE: Array, f_BLE: Array, v_BLE: Array, reset_BL: Array, window: int) -> Sums:
    """The same of the last `window` tokens.

    Not a difference of two sums, as elsewhere: one weight that has left the window may be larger
    than all in it by more than float32 has digits.
    """
    f_BLE = jnp.where(reset_BL[..., None], NEVER, f_BLE)
    there = (i_BLE > NEVER).astype(jnp.float32)
    one = f_BLE, Sums(jnp.maximum(i_BLE, NEVER), there * v_BLE, there)
    return interventions.over_window(_joined, one, window, (0.0, NOTHING))[1]


def _joined(older: tuple[Array, Sums], newer: tuple[Array, Sums]) -> tuple[Array, Sums]:
    """Log-decays and sums of two stretches of tokens, one behind the other."""
    (f1, first), (f2, second) = older, newer
    kept = first.m + f2
    m = jax.lax.stop_gradient(jnp.maximum(kept, second.m))
    keep, write = jnp.exp(kept - m), jnp.exp(second.m - m)
    num, den = (keep * x + write * y for x, y in zip(first[1:], second[1:], strict=True))
    return f1 + f2, Sums(m, num, den)


def _mean(past: Sums, i_BLE: Array, v_BLE: Array) -> Array:
    """The mean of what is in sums and of one token more, whose weight is `exp(i)`."""
    top = jax.lax.stop_gradient(jnp.maximum(past.m, i_BLE))  # the mean is the same of any
    keep, write = jnp.exp(past.m - top), jnp.exp(i_BLE - top)
    return (keep * past.num + write * v_BLE) / (keep * past.den + write)
