"""The LSTM as a mixer: gates that see the state before, hence token by token."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.nn import interventions
from lcm.nn.dense import dense, matrix, orthogonal
from lcm.nn.recurrent import RecurrentMixer, RecurrentState, empty, entered
from lcm.nn.spec import LayerSpec
from lcm.types import Array, Context, Hidden


class LSTM(RecurrentMixer):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997; gates as in Gers et al., 2000), of
    E = expand D channels.

        i, f, g, o = x W + h_{t-1} U + b
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)        h_t = sigmoid(o) tanh(c_t)
        out = h W_out

    Forget biases begin at 1. Option `chrono=T` begins them at log U(1, T - 1) and input biases at
    the negative, for memories of up to T tokens (Tallec and Ollivier, arXiv:1804.11188).
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"chrono": 0}
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {"chrono": (0, 1 << 30)}

    EXTENDS = interventions.LINEAR - {"window"}  # gates see the state

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, inner, longest = spec, spec.inner, spec.option("chrono")
        glorot = jax.nn.initializers.glorot_uniform()
        of_input = [glorot(rngs.params(), (spec.width, inner)) for _ in range(4)]
        of_state = [orthogonal(rngs, inner, inner)[...] for _ in range(4)]
        self.gates = nnx.Param(jnp.concatenate(of_input, 1))
        self.recurrent = nnx.Param(jnp.concatenate(of_state, 1))
        i, f = jnp.zeros(inner), jnp.ones(inner)
        if longest:
            f = jnp.log(
                jax.random.uniform(rngs.params(), (inner,), minval=1, maxval=max(longest - 1, 1))
            )
            i = -f
        self.gates_bias = nnx.Param(jnp.concatenate([i, f, jnp.zeros(2 * inner)]))
        self.out = matrix(rngs, inner, spec.width, depth=spec.depth)

    def __call__(
        self, x_BLD: Hidden, context: Context, state: RecurrentState | None, shared: dict
    ) -> tuple[Hidden, RecurrentState | None]:
        before, reset_BL, there_BL = entered(state, self.init_state(self.spec, len(x_BLD)), context)
        own_BLF = dense(x_BLD, self.gates[...]).astype(jnp.float32) + self.gates_bias[...]
        u_EF = self.recurrent[...].astype(x_BLD.dtype)

        def step(memory: dict[str, Array], xs: tuple) -> tuple[dict, Array]:
            own_BF, reset_B, there_B, token = xs
            c, h = (jnp.where(reset_B[:, None], 0, memory[name]) for name in ("c", "h"))
            i, f, g, o = jnp.split(own_BF + dense(h.astype(u_EF.dtype), u_EF), 4, 1)
            log_keep, gain = interventions.gate(self.spec.extension, token, jax.nn.log_sigmoid(f))
            c = jnp.exp(log_keep) * c + gain * jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            kept = {"c": jnp.where(there_B[:, None], c, memory["c"])}
            return {**kept, "h": jnp.where(there_B[:, None], h, memory["h"])}, h

        xs = tuple(each.swapaxes(0, 1) for each in (own_BLF, reset_BL, there_BL))
        tokens = interventions.by_token(context)
        memory, h_LBE = jax.lax.scan(step, before.memory, (*xs, tokens))
        out_BLD = dense(h_LBE.swapaxes(0, 1).astype(x_BLD.dtype), self.out[...])
        return out_BLD, None if state is None else RecurrentState(memory, (), before.segment_B)

    @staticmethod
    def init_state(
        spec: LayerSpec, batch: int, length: int = 0, dtype: jnp.dtype | None = None, chunk: int = 0
    ) -> RecurrentState:
        """The empty state, float32 whatever the dtype of caches, for any length."""
        return empty(batch, {"c": (spec.inner,), "h": (spec.inner,)}, (), 1)

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass: gates of input and state, and output."""
        return 2 * spec.inner * (4 * spec.width + 4 * spec.inner + spec.width)
