"""What mixers with a matrix for a state share: projections, short convolutions, gated outputs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.nn import interventions
from lcm.nn.dense import dense, matrix
from lcm.nn.interventions import Extension
from lcm.nn.norm import RMSNorm
from lcm.nn.recurrent import RecurrentMixer, RecurrentState, conv_uniform, empty, entered
from lcm.nn.spec import LayerSpec
from lcm.ops.recurrence import short_conv
from lcm.ops.recurrence.reference import Erase
from lcm.types import Array, Context, Hidden


class Projected(NamedTuple):
    """What the recurrence of a `LinearMixer` is made of; values are 0 at padding.

    memory: the state before the first token.
    reset_BL, there_BL: where documents begin, and where no padding is.
    """

    u_BLD: Hidden
    q_BLGN: Array
    k_BLGN: Array
    v_BLHP: Array
    memory: Any
    reset_BL: Array
    there_BL: Array
    context: Context

    def there(self, x: Array, otherwise: float = 0) -> Array:
        """`x` `[B, L, ...]`, and something else at padding."""
        where = self.there_BL.reshape(*self.there_BL.shape, *[1] * (x.ndim - 2))
        return jnp.where(where, x, otherwise)


class LinearMixer(RecurrentMixer):
    """Queries, keys and values of H heads, a recurrence of one matrix `[N, P]` a head, a gate.

        q, k, v = u W_q, u W_k, u W_v              those of a subclass with `convolves`: silu(conv)
        y = the recurrence of the subclass, `mix`
        out = (norm(y) gate(u W_z)) W_out          norm by head, its scale shared by all

    G heads (`kv_heads`) of queries and keys are shared by H / G heads of values each; N is `state`
    and P `head_size`.
    """

    convolves = False
    EXTENDS = interventions.LINEAR

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec = spec
        keys, values = _channels(spec)
        self.q = matrix(rngs, spec.width, keys)
        self.k = matrix(rngs, spec.width, keys)
        self.v = matrix(rngs, spec.width, values)
        self.z = matrix(rngs, spec.width, values)
        self.out = matrix(rngs, values, spec.width, depth=spec.depth)
        self.norm = RMSNorm(spec.head_size, spec.norm_eps)
        if self.convolves:
            for name, channels in (("q", keys), ("k", keys), ("v", values)):
                setattr(self, f"conv_{name}", conv_uniform(rngs, spec, spec.conv, 1, channels))

    def __call__(
        self, u_BLD: Hidden, context: Context, state: RecurrentState | None, shared: dict
    ) -> tuple[Hidden, RecurrentState | None]:
        spec, (batch, length) = self.spec, u_BLD.shape[:2]
        before, reset_BL, there_BL = entered(state, self.init_state(spec, batch), context)
        projected, tails = [], []
        for i, name in enumerate(("q", "k", "v")):
            own = dense(u_BLD, getattr(self, name)[...])
            if self.convolves:
                taps, none = getattr(self, f"conv_{name}")[:, 0], jnp.zeros(own.shape[-1])
                own, tail = short_conv(own, taps, none, before.tails[i], reset_BL, there_BL)
                own, tails = jax.nn.silu(own), [*tails, tail]
            heads = spec.heads if name == "v" else spec.kv_heads
            projected.append(own.reshape(batch, length, heads, -1))
        given = Projected(u_BLD, *projected, before.memory, reset_BL, there_BL, context)
        given = given._replace(v_BLHP=given.there(given.v_BLHP))  # padding writes nothing
        y_BLHP, memory = self.mix(given)
        out_BLD = dense(self.gated(y_BLHP, u_BLD), self.out[...])
        after = RecurrentState(memory, tuple(tails), before.segment_B)
        return out_BLD, None if state is None else after

    def mix(self, given: Projected) -> tuple[Array, Any]:
        """The outputs `[B, L, H, P]` of the recurrence and its state; padding writes nothing."""
        raise NotImplementedError

    def run(
        self,
        given: Projected,
        q_BLGN: Array,
        k_BLGN: Array,
        v_BLHP: Array,
        log_decay: Array,
        S0_BHNP: Array,
        erase: Erase | None = None,
        extension: Extension | None = None,
    ) -> tuple[Array, Array]:
        """The recurrence within the documents of what is given; padding keeps the state."""
        return interventions.matrix(
            extension or self.spec.extension,
            given.context if extension is None else given.context._replace(pace_BL=None),
            q_BLGN,
            k_BLGN,
            v_BLHP,
            given.there(log_decay),
            erase,
            S0_BHNP,
            given.reset_BL,
            self.spec.recurrence_chunk,
        )

    def gated(self, y_BLHP: Array, u_BLD: Hidden) -> Array:
        """The normalised outputs times `silu` of their gate, `[B, L, H P]`."""
        return self.opened(y_BLHP, jax.nn.silu(dense(u_BLD, self.z[...])))

    def opened(self, y_BLHP: Array, gate_BLE: Array) -> Array:
        normed = self.norm(y_BLHP)
        return normed.reshape(gate_BLE.shape) * gate_BLE

    @classmethod
    def init_state(
        cls,
        spec: LayerSpec,
        batch: int,
        length: int = 0,
        dtype: jnp.dtype | None = None,
        chunk: int = 0,
    ) -> RecurrentState:
        """The empty state, float32 whatever the dtype of caches, for any length."""
        keys, values = _channels(spec)
        return empty(
            batch, cls.memory(spec), (keys, keys, values) if cls.convolves else (), spec.conv
        )

    @staticmethod
    def memory(spec: LayerSpec) -> Any:
        """Shapes of the recurrence's state, without the axis of rows."""
        return spec.heads, spec.state, spec.head_size

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass: projections, and the state written and read."""
        keys, values = _channels(spec)
        return 2 * spec.width * (2 * keys + 3 * values) + 4 * values * spec.state


def _channels(spec: LayerSpec) -> tuple[int, int]:
    """Of queries as of keys, and of values."""
    return spec.kv_heads * spec.state, spec.inner
