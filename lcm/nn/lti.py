"""What time-invariant recurrences share: complex states, and what follows them."""

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.nn import interventions
from lcm.nn.dense import dense, matrix
from lcm.nn.recurrent import RecurrentMixer, RecurrentState, empty, entered
from lcm.nn.spec import LayerSpec
from lcm.types import Array, Context, Hidden


class Output(RecurrentMixer):
    """The end of the layers of S4D, S5 and LRU: `(g W_out) sigmoid(g W_glu)`, `g = gelu(y)`."""

    def finish(self, y_BLD: Hidden) -> Hidden:
        g_BLD = jax.nn.gelu(y_BLD)
        return dense(g_BLD, self.out[...]) * jax.nn.sigmoid(dense(g_BLD, self.glu[...]))

    def add_output(self, spec: LayerSpec, rngs: nnx.Rngs) -> None:
        self.out = matrix(rngs, spec.width, spec.width, depth=spec.depth)
        self.glu = matrix(rngs, spec.width, spec.width)


class DiagonalSystem(Output):
    """One system of all D channels with P complex states, for S5 and the LRU.

        h_t = a h_{t-1} + s (B x_t)        y_t = Re(C h_t) + D x_t

    B `[D, 2 P]` has real parts, then imaginary ones; C `[2 P, D]` real parts, then imaginary ones
    negated, so that it is one matmul each.
    """

    EXTENDS = interventions.LINEAR

    @classmethod
    def size(cls, spec: LayerSpec) -> int:
        """P."""
        raise NotImplementedError

    def rates(self) -> tuple[Array, Array]:
        """a and s, complex64 `[P]`; s may be real."""
        raise NotImplementedError

    def __call__(
        self, x_BLD: Hidden, context: Context, state: RecurrentState | None, shared: dict
    ) -> tuple[Hidden, RecurrentState | None]:
        spec = self.spec
        before, reset_BL, there_BL = entered(state, self.init_state(spec, len(x_BLD)), context)
        a_P, s_P = self.rates()
        there_BL1 = there_BL[..., None]
        read_BLP = as_complex(dense(x_BLD, self.B[...]).astype(jnp.float32))
        h_BLP, last_BP = interventions.diagonal(
            spec.extension,
            context,
            jnp.where(there_BL1, a_P, 1),  # padding keeps h and writes nothing
            jnp.where(there_BL1, s_P * read_BLP, 0),
            before.memory["re"] + 1j * before.memory["im"],
            reset_BL,
            spec.recurrence_chunk,
        )
        parts_BLQ = jnp.concatenate([h_BLP.real, h_BLP.imag], -1)
        y_BLD = dense(parts_BLQ, self.C[...]) + self.D[...] * x_BLD
        after = RecurrentState({"re": last_BP.real, "im": last_BP.imag}, (), before.segment_B)
        return self.finish(y_BLD.astype(x_BLD.dtype)), None if state is None else after

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
        return empty(batch, {"re": (cls.size(spec),), "im": (cls.size(spec),)}, (), 1)

    @classmethod
    def flops(cls, spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass: B and C, and the output."""
        return 2 * spec.width * (4 * cls.size(spec) + 2 * spec.width)


def as_complex(parts: Array) -> Array:
    """Real parts, then imaginary ones, of the last axis."""
    real, imaginary = jnp.split(parts, 2, -1)
    return jax.lax.complex(real, imaginary)


def held(exponent: Array) -> tuple[Array, Array]:
    """`e^z` and `e^z - 1` of complex numbers, without what cancels next to 0."""
    real, half = exponent.real, exponent.imag / 2
    less = jnp.expm1(real) - 2 * jnp.exp(real) * jnp.sin(half) ** 2
    less = jax.lax.complex(less, jnp.exp(real) * jnp.sin(exponent.imag))
    return jnp.exp(exponent), less
