"""Mamba-2 as a mixer: a matrix for each head that decays and is written to."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.nn import interventions
from lcm.nn.dense import dense, matrix
from lcm.nn.norm import GatedNorm
from lcm.nn.recurrent import (
    RecurrentMixer,
    RecurrentState,
    conv_uniform,
    empty,
    entered,
    step_biases,
)
from lcm.nn.spec import LayerSpec
from lcm.ops.recurrence import short_conv
from lcm.types import Array, Context, Hidden


class Mamba2(RecurrentMixer):
    """State-space duality (Dao and Gu, arXiv:2405.21060), of H heads with a state `[N, P]` each.

        x, b, c = silu(conv(u W_x, u W_bc))        dt = softplus(u W_dt + dt_bias)
        S_t = exp(dt_t A) S_{t-1} + dt_t b_t x_t^T          A = -exp(A_log), one number a head
        y_t = S_t^T c_t + D x_t                    out = norm(y silu(u W_z)) W_out

    H P = expand D; heads share b and c in groups. Option `least_step` bounds dt from below;
    `clocked` has it multiplied by a parameter of each head, 1 at first (`lcm.models.distance`).
    Initial values are as published, which in `transformers` A is not.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"least_step": 0.0, "clocked": False}
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {"least_step": (0.0, 1e3)}
    EXTENDS = interventions.ALL
    PACED = True  # times between tokens may scale dt, as in IC-Mamba (arXiv:2502.04655)

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec = spec
        inner, shared = _channels(spec)
        self.z = matrix(rngs, spec.width, inner)
        self.x = matrix(rngs, spec.width, inner)
        self.bc = matrix(rngs, spec.width, shared)
        self.dt = matrix(rngs, spec.width, spec.heads)
        self.conv_x = conv_uniform(rngs, spec, spec.conv, 1, inner)
        self.conv_bc = conv_uniform(rngs, spec, spec.conv, 1, shared)
        self.conv_x_bias = conv_uniform(rngs, spec, inner)
        self.conv_bc_bias = conv_uniform(rngs, spec, shared)
        A = jax.random.uniform(rngs.params(), (spec.heads,), minval=1, maxval=16)
        self.A_log = nnx.Param(jnp.log(A))
        self.dt_bias = step_biases(rngs, spec.heads)
        if spec.option("clocked"):
            self.clock = nnx.Param(jnp.ones(spec.heads))
        self.D = nnx.Param(jnp.ones(spec.heads))
        self.norm = GatedNorm(inner, spec.norm_eps, spec.groups)
        self.out = matrix(rngs, inner, spec.width, depth=spec.depth)

    def __call__(
        self, u_BLD: Hidden, context: Context, state: RecurrentState | None, shared: dict
    ) -> tuple[Hidden, RecurrentState | None]:
        spec = self.spec
        before, reset_BL, there_BL = entered(state, self.init_state(spec, len(u_BLD)), context)
        x_BLHP, b_BLGN, c_BLGN, dt_BLH, tails = self._read(u_BLD, before, reset_BL, there_BL)
        y_BLHP, S_BHNP = interventions.matrix(
            spec.extension,
            context,
            c_BLGN,
            b_BLGN,
            (x_BLHP * dt_BLH[..., None]).astype(x_BLHP.dtype),
            -interventions.rate(spec.extension, self.A_log[...]) * dt_BLH,
            None,
            before.memory,
            reset_BL,
            spec.recurrence_chunk,
        )
        y_BLHP += self.D[...].astype(x_BLHP.dtype)[:, None] * x_BLHP
        gate_BLE = dense(u_BLD, self.z[...])
        out_BLD = dense(self.norm(y_BLHP.reshape(gate_BLE.shape), gate_BLE), self.out[...])
        after = RecurrentState(S_BHNP, tails, before.segment_B)
        return out_BLD, None if state is None else after

    def _read(
        self, u_BLD: Hidden, before: RecurrentState, reset_BL: Array, there_BL: Array
    ) -> tuple[Array, Array, Array, Array, tuple[Array, ...]]:
        """x, b, c and dt of tokens, and the tails of the convolutions behind them."""
        spec, (batch, length) = self.spec, u_BLD.shape[:2]
        mixed = []
        for name, tail in zip(("x", "bc"), before.tails, strict=True):
            taps, bias = getattr(self, f"conv_{name}"), getattr(self, f"conv_{name}_bias")
            own = dense(u_BLD, getattr(self, name)[...])
            mixed.append(short_conv(own, taps[:, 0], bias[...], tail, reset_BL, there_BL))
        (x, x_tail), (bc, bc_tail) = mixed
        x_BLHP = jax.nn.silu(x).reshape(batch, length, spec.heads, spec.head_size)
        bc = jax.nn.silu(bc).reshape(batch, length, 2 * spec.groups, spec.state)
        b_BLGN, c_BLGN = jnp.split(bc, 2, axis=2)
        dt_BLH = jnp.where(there_BL[..., None], self._steps(u_BLD), 0)  # padding passes no time
        return x_BLHP, b_BLGN, c_BLGN, dt_BLH, (x_tail, bc_tail)

    def _steps(self, u_BLD: Hidden) -> Array:
        dt_BLH = dense(u_BLD, self.dt[...]).astype(jnp.float32) + self.dt_bias[...]
        least = self.spec.option("least_step")
        dt_BLH = jnp.maximum(jax.nn.softplus(dt_BLH), least) if least else jax.nn.softplus(dt_BLH)
        return self.clock[...] * dt_BLH if self.spec.option("clocked") else dt_BLH

    def hidden_attention(self, u_BLD: Hidden, context: Context) -> Array:
        """By what the last token's output, without that of D, has each token's x as a factor,
        float32 `[B, L, H]`; of rows that are one document, without an extension."""
        before, reset_BL, there_BL = entered(None, self.init_state(self.spec, len(u_BLD)), context)
        _, b_BLGN, c_BLGN, dt_BLH, _ = self._read(u_BLD, before, reset_BL, there_BL)
        log_BLH = -jnp.exp(self.A_log[...]) * dt_BLH
        left_BLH = jnp.exp(log_BLH.sum(1, keepdims=True) - jnp.cumsum(log_BLH, 1))
        alike_BLG = jnp.einsum("bgn,blgn->blg", c_BLGN[:, -1], b_BLGN)
        each = self.spec.heads // self.spec.groups
        return jnp.repeat(alike_BLG, each, axis=2) * left_BLH * dt_BLH

    def importance(self, u_BLD: Hidden, context: Context) -> Array:
        """The norm of a token's steps, by which DeciMamba ranks, `[B, L]`."""
        return jnp.linalg.norm(self._steps(u_BLD), axis=-1)

    @staticmethod
    def init_state(
        spec: LayerSpec, batch: int, length: int = 0, dtype: jnp.dtype | None = None, chunk: int = 0
    ) -> RecurrentState:
        """The empty state, float32 whatever the dtype of caches, for any length."""
        return empty(batch, (spec.heads, spec.state, spec.head_size), _channels(spec), spec.conv)

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass: projections, and to write and read the state.

        Those of the C x C blocks, which only the form in chunks has, are not counted.
        """
        inner, shared = _channels(spec)
        return 2 * spec.width * (3 * inner + shared + spec.heads) + 4 * inner * spec.state


def _channels(spec: LayerSpec) -> tuple[int, int]:
    """Of x, and of b and c."""
    return spec.inner, 2 * spec.groups * spec.state
