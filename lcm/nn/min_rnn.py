"""The minimal GRU and LSTM: gates that see the input alone, so that a scan computes them."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.nn import interventions
from lcm.nn.bias import add_biases, biased
from lcm.nn.dense import dense, matrix
from lcm.nn.recurrent import RecurrentMixer, RecurrentState, empty, entered
from lcm.nn.spec import LayerSpec
from lcm.types import Array, Context, Hidden


class MinRNN(RecurrentMixer):
    """What the two share (Feng et al., arXiv:2410.01201), of E = expand D channels.

        h_t = keep_t h_{t-1} + write_t g(x W_h)        out = h W_out
        g(x) = x + 0.5 where x >= 0, sigmoid(x) elsewhere

    All of it is positive from h_0 = 0 on, and no gate passes 1, so the scan needs no logarithms.
    Without a convolution: another layer may have it.
    """

    EXTENDS = interventions.LINEAR
    gates: ClassVar[tuple[str, ...]]

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, inner = spec, spec.inner
        for name in (*self.gates, "candidate"):
            setattr(self, name, matrix(rngs, spec.width, inner))
        self.out = matrix(rngs, inner, spec.width, depth=spec.depth)
        add_biases(self, spec.biases, out=spec.width)

    def __call__(
        self, x_BLD: Hidden, context: Context, state: RecurrentState | None, shared: dict
    ) -> tuple[Hidden, RecurrentState | None]:
        spec, f32 = self.spec, jnp.float32
        before, reset_BL, there_BL = entered(state, self.init_state(spec, len(x_BLD)), context)
        there_BL1 = there_BL[..., None]
        opened = [dense(x_BLD, getattr(self, name)[...]).astype(f32) for name in self.gates]
        keep_BLE, write_BLE = self.shares(*opened)
        candidate_BLE = positive(dense(x_BLD, self.candidate[...]).astype(f32))
        h_BLE, last_BE = interventions.diagonal(
            spec.extension,
            context,
            jnp.where(there_BL1, keep_BLE, 1),  # padding keeps h and writes nothing
            jnp.where(there_BL1, write_BLE * candidate_BLE, 0),
            before.memory,
            reset_BL,
            spec.recurrence_chunk,
        )
        out_BLD = biased(self, "out", dense(h_BLE.astype(x_BLD.dtype), self.out[...]))
        return out_BLD, None if state is None else RecurrentState(last_BE, (), before.segment_B)

    @staticmethod
    def init_state(
        spec: LayerSpec, batch: int, length: int = 0, dtype: jnp.dtype | None = None, chunk: int = 0
    ) -> RecurrentState:
        """The empty state, float32 whatever the dtype of caches, for any length."""
        return empty(batch, (spec.inner,), (), 1)

    @classmethod
    def flops(cls, spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass: candidate, gates and output."""
        return 2 * spec.inner * spec.width * (2 + len(cls.gates))


class MinGRU(MinRNN):
    """`h_t = (1 - z_t) h_{t-1} + z_t g(x W_h)`, `z = sigmoid(x W_z)`."""

    gates = ("update",)

    @staticmethod
    def shares(z: Array) -> tuple[Array, Array]:
        """What is kept and what is written."""
        return jax.nn.sigmoid(-z), jax.nn.sigmoid(z)


class MinLSTM(MinRNN):
    """`h_t = (f_t h_{t-1} + i_t g(x W_h)) / (f_t + i_t)`, both gates sigmoids of `x W`."""

    gates = ("forget", "admit")

    @staticmethod
    def shares(f: Array, i: Array) -> tuple[Array, Array]:
        """What is kept and what is written, by the logarithm of their ratio: no 0 / 0."""
        ratio = jax.nn.log_sigmoid(f) - jax.nn.log_sigmoid(i)
        return jax.nn.sigmoid(ratio), jax.nn.sigmoid(-ratio)


def positive(x: Array) -> Array:
    """g of the paper: continuous, positive, and `x + 0.5` from 0 on."""
    return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x))
