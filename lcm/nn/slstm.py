"""The sLSTM of xLSTM as a mixer: exponential gates that see the state before, token by token."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcm.nn import interventions
from lcm.nn.dense import dense, matrix
from lcm.nn.maxima import NEVER
from lcm.nn.norm import CentredNorm
from lcm.nn.recurrent import RecurrentMixer, RecurrentState, conv_uniform, empty, entered
from lcm.nn.spec import LayerSpec
from lcm.ops.recurrence import short_conv
from lcm.types import Array, Context, Hidden


class SLSTM(RecurrentMixer):
    """Scalar memories of H heads of P (Beck et al., arXiv:2405.04517, section 2.2), E = H P =
    expand D channels.

        i, f of silu(conv(x)), z, o of x: W_head x + R_head h_{t-1} + b
        m_t = max(logsigmoid(f) + m_{t-1}, i)
        c_t = exp(logsigmoid(f) + m_{t-1} - m_t) c_{t-1} + exp(i - m_t) tanh(z)
        n_t = the same of 1 in place of tanh(z)
        h_t = sigmoid(o) c_t / n_t               out = norm_by_head(h) W_out

    x = u W_x. R begins at 0, forget biases at 5 - 12 (p / (P - 1))^0.3 as in the first of the
    published layers.
    """

    EXTENDS = interventions.LINEAR - {"window"}  # gates see the state

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, inner, heads, size = spec, spec.inner, spec.heads, spec.head_size
        self.x = matrix(rngs, spec.width, inner)
        self.conv = conv_uniform(rngs, spec, spec.conv, 1, inner)
        self.conv_bias = conv_uniform(rngs, spec, inner)
        # By head; the gates i, f, z, o after one another.
        self.head_gates = matrix(rngs, 4, heads, size, size)
        self.head_recurrent = nnx.Param(jnp.zeros((4, heads, size, size)))
        place = np.arange(size) / max(size - 1, 1)
        forget = jnp.asarray(5 - 12 * place**0.3, jnp.float32)
        self.head_gates_bias = nnx.Param(jnp.zeros((4, heads, size)).at[1].set(forget))
        self.head_norm = CentredNorm((heads, size), spec.norm_eps)
        self.out = matrix(rngs, inner, spec.width, depth=spec.depth)

    def __call__(
        self, u_BLD: Hidden, context: Context, state: RecurrentState | None, shared: dict
    ) -> tuple[Hidden, RecurrentState | None]:
        spec, (batch, length) = self.spec, u_BLD.shape[:2]
        before, reset_BL, there_BL = entered(state, self.init_state(spec, batch), context)
        x_BLE, (tail,) = dense(u_BLD, self.x[...]), before.tails
        mixed_BLE, tail = short_conv(
            x_BLE, self.conv[:, 0], self.conv_bias[...], tail, reset_BL, there_BL
        )
        by_head = lambda x: x.reshape(batch, length, spec.heads, spec.head_size)  # noqa: E731
        mixed, plain = by_head(jax.nn.silu(mixed_BLE)), by_head(x_BLE)
        w_GHPQ = self.head_gates[...].astype(plain.dtype)
        both = jnp.stack([mixed, mixed, plain, plain])
        own = jnp.einsum("gblhp,ghpq->lbghq", both, w_GHPQ).astype(jnp.float32)
        memory, h_LBHP = _memories(
            before.memory,
            own + self.head_gates_bias[...],
            self.head_recurrent[...],
            reset_BL.swapaxes(0, 1),
            there_BL.swapaxes(0, 1),
            partial(interventions.gate, spec.extension),
            interventions.by_token(context),
        )
        h_BLE = self.head_norm(h_LBHP.swapaxes(0, 1)).astype(u_BLD.dtype)
        out_BLD = dense(h_BLE.reshape(x_BLE.shape), self.out[...])
        after = RecurrentState(memory, (tail,), before.segment_B)
        return out_BLD, None if state is None else after

    @staticmethod
    def init_state(
        spec: LayerSpec, batch: int, length: int = 0, dtype: jnp.dtype | None = None, chunk: int = 0
    ) -> RecurrentState:
        """The empty state, float32 whatever the dtype of caches, for any length.

        Its `m` is kept as 0 where `n` is 0: no token has been seen.
        """
        shape = spec.heads, spec.head_size
        return empty(batch, dict.fromkeys("chmn", shape), (spec.inner,), spec.conv)

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass: projections, and gates of input and state."""
        return 2 * spec.inner * (2 * spec.width + 8 * spec.head_size)


def _memories(
    memory: dict[str, Array],
    own: Array,
    r_GHPQ: Array,
    reset_LB: Array,
    there_LB: Array,
    extended: Callable[[Context, Array], tuple[Array, Array | float]],
    tokens: Context,
) -> tuple[dict[str, Array], Array]:
    """The memory after all tokens and `h` `[L, B, H, P]`, of gates `[L, B, 4, H, P]` without what
    they see of the state."""

    def step(memory: dict[str, Array], xs: tuple) -> tuple[dict, Array]:
        own_BGHP, reset_B, there_B, token = xs
        reset, there = reset_B[:, None, None], there_B[:, None, None]
        c, h, m, n = (jnp.where(reset, 0, memory[name]) for name in "chmn")
        i, f, z, o = jnp.moveaxis(own_BGHP + jnp.einsum("bhp,ghpq->bghq", h, r_GHPQ), 1, 0)
        log_keep, gain = extended(token, jax.nn.log_sigmoid(f))
        i += jnp.log(gain)
        kept = jnp.where(n > 0, log_keep + m, NEVER)
        top = jax.lax.stop_gradient(jnp.maximum(kept, i))  # c / n is the same of any
        keep, write = jnp.exp(kept - top), jnp.exp(i - top)
        c, n = keep * c + write * jnp.tanh(z), keep * n + write
        h = jax.nn.sigmoid(o) * c / n
        after = {"c": c, "h": h, "m": top, "n": n}
        return {name: jnp.where(there, after[name], memory[name]) for name in "chmn"}, h

    return jax.lax.scan(step, memory, (own, reset_LB, there_LB, tokens))
