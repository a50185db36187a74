"""Griffin's recurrent block as a mixer: a vector with gates of input and recurrence."""

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.nn import interventions
from lcm.nn.bias import add_biases, biased
from lcm.nn.dense import dense, matrix
from lcm.nn.recurrent import RecurrentMixer, RecurrentState, empty, entered
from lcm.nn.spec import LayerSpec
from lcm.ops.recurrence import short_conv
from lcm.types import Array, Context, Hidden

SHARPNESS = 8.0  # c of the paper
STEEPEST = 1000.0  # largest gradient of the square root


class RGLRU(RecurrentMixer):
    """The block of Griffin and Hawk (De et al., arXiv:2402.19427), of M = expand D channels.

    x = conv(u W_x)            r, i = sigmoid(x W_r), sigmoid(x W_i)       H blocks of M / H
    log a_t = -8 r_t softplus(a_param)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t                            h_1 = i_1 x_1
    out = (h gelu(u W_y)) W_out
    """

    EXTENDS = interventions.LINEAR

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, inner = spec, spec.inner
        self.x = matrix(rngs, spec.width, inner)
        self.y = matrix(rngs, spec.width, inner)
        self.out = matrix(rngs, inner, spec.width, depth=spec.depth)
        add_biases(self, spec.biases, x=inner, y=inner, out=spec.width)
        normal = jax.random.normal(rngs.params(), (spec.conv, 1, inner))
        self.conv = nnx.Param(0.1 * spec.conv**-0.5 * normal)
        self.conv_bias = nnx.Param(jnp.zeros(inner))
        blocks = spec.heads, spec.head_size, spec.head_size  # on the diagonal of a matrix
        self.recurrence = matrix(rngs, *blocks)
        self.recurrence_bias = nnx.Param(jnp.zeros(inner))
        self.input = matrix(rngs, *blocks)
        self.input_bias = nnx.Param(jnp.zeros(inner))
        # exp(-softplus(a_param)) = a of r = 1 / 8, whose square is uniform from 0.9^2 to 0.999^2.
        square = jax.random.uniform(rngs.params(), (inner,), minval=0.9**2, maxval=0.999**2)
        self.a_param = nnx.Param(jnp.log(jnp.expm1(-0.5 * jnp.log(square))))

    def __call__(
        self, u_BLD: Hidden, context: Context, state: RecurrentState | None, shared: dict
    ) -> tuple[Hidden, RecurrentState | None]:
        spec = self.spec
        before, reset_BL, there_BL = entered(state, self.init_state(spec, len(u_BLD)), context)
        x_BLM = biased(self, "x", dense(u_BLD, self.x[...]))
        taps, (tail,) = self.conv[:, 0], before.tails
        x_BLM, tail = short_conv(x_BLM, taps, self.conv_bias[...], tail, reset_BL, there_BL)

        r_BLM, i_BLM = self._opened("recurrence", x_BLM), self._opened("input", x_BLM)
        log_a_BLM = -SHARPNESS * r_BLM * jax.nn.softplus(self.a_param[...])
        log_a_BLM = jnp.where(there_BL[..., None], log_a_BLM, 0)  # padding keeps h: a = 1
        share_BLM = _sqrt(-jnp.expm1(2 * log_a_BLM))
        share_BLM = jnp.where(reset_BL[..., None], 1, share_BLM)
        h_BLM, last_BM = interventions.diagonal(
            spec.extension,
            context,
            jnp.exp(log_a_BLM),
            share_BLM * i_BLM * x_BLM,
            before.memory,
            reset_BL,
            spec.recurrence_chunk,
        )
        y_BLM = jax.nn.gelu(biased(self, "y", dense(u_BLD, self.y[...])), approximate=True)
        out_BLD = dense(h_BLM.astype(u_BLD.dtype) * y_BLM, self.out[...])
        after = RecurrentState(last_BM, (tail,), before.segment_B)
        return biased(self, "out", out_BLD), None if state is None else after

    def _opened(self, name: str, x_BLM: Array) -> Array:
        """A gate between 0 and 1, float32."""
        w_HMM, bias_M = getattr(self, name)[...], getattr(self, f"{name}_bias")[...]
        x_NHM = x_BLM.reshape(-1, len(w_HMM), w_HMM.shape[1])
        y_NHM = jnp.einsum("nhi,hij->nhj", x_NHM, w_HMM.astype(x_NHM.dtype))
        return jax.nn.sigmoid(y_NHM.reshape(x_BLM.shape).astype(jnp.float32) + bias_M)

    @staticmethod
    def init_state(
        spec: LayerSpec, batch: int, length: int = 0, dtype: jnp.dtype | None = None, chunk: int = 0
    ) -> RecurrentState:
        """The empty state, float32 whatever the dtype of caches, for any length."""
        return empty(batch, (spec.inner,), (spec.inner,), spec.conv)

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass: projections and gates."""
        return 2 * spec.inner * (3 * spec.width + 2 * spec.head_size)


@jax.custom_jvp
def _sqrt(x: Array) -> Array:
    """The square root, whose gradient does not pass 1000 where a is 1 or next to it."""
    return jnp.sqrt(x)


@_sqrt.defjvp
def _sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (d_x,) = primals, tangents
    root = jnp.sqrt(x)
    return root, d_x / jnp.maximum(2 * root, 1 / STEEPEST)
