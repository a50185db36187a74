"""A short convolution between two gates as a mixer: what stands near, and no more."""

import jax.numpy as jnp
from flax import nnx

from lcm.nn.bias import add_biases, biased
from lcm.nn.dense import dense, matrix
from lcm.nn.recurrent import RecurrentMixer, RecurrentState, conv_uniform, empty, entered
from lcm.nn.spec import LayerSpec
from lcm.ops.recurrence import short_conv
from lcm.types import Context, Hidden


class GatedConv(RecurrentMixer):
    """The short convolution of LFM2 (Liquid AI, arXiv:2511.23404), of D channels and W taps:

        b, c, x = u W_b, u W_c, u W_x
        out = (c conv(b x)) W_out

    Its only state is the last W - 1 tokens of `b x`. Before a recurrence that has no convolution it
    brings a key to its value. `model.biases=mixer` puts biases on projections and convolution.
    """

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, width = spec, spec.width
        for name in ("b", "c", "x"):
            setattr(self, name, matrix(rngs, width, width))
        self.conv = conv_uniform(rngs, spec, spec.conv, 1, width)
        self.out = matrix(rngs, width, width, depth=spec.depth)
        add_biases(self, spec.biases, b=width, c=width, x=width, conv=width, out=width)

    def __call__(
        self, u_BLD: Hidden, context: Context, state: RecurrentState | None, shared: dict
    ) -> tuple[Hidden, RecurrentState | None]:
        before, reset_BL, there_BL = entered(state, self.init_state(self.spec, len(u_BLD)), context)
        b_BLD, c_BLD, x_BLD = (
            biased(self, name, dense(u_BLD, getattr(self, name)[...])) for name in ("b", "c", "x")
        )
        taps, (tail,) = self.conv[:, 0], before.tails
        no_bias = jnp.zeros(self.spec.width)
        y_BLD, tail = short_conv(b_BLD * x_BLD, taps, no_bias, tail, reset_BL, there_BL)
        y_BLD = biased(self, "conv", y_BLD)
        out_BLD = biased(self, "out", dense(c_BLD * y_BLD, self.out[...]))
        after = RecurrentState({}, (tail,), before.segment_B)
        return out_BLD, None if state is None else after

    @staticmethod
    def init_state(
        spec: LayerSpec, batch: int, length: int = 0, dtype: jnp.dtype | None = None, chunk: int = 0
    ) -> RecurrentState:
        """The empty state, float32 whatever the dtype of caches, for any length."""
        return empty(batch, {}, (spec.width,), spec.conv)

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass."""
        return 8 * spec.width**2
