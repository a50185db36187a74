"""Mamba as a mixer: channels that each keep N numbers, with steps that depend on the input."""

import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcm.errors import ConfigError
from lcm.nn import interventions
from lcm.nn.dense import dense, matrix
from lcm.nn.norm import RMSNorm, UnscaledNorm
from lcm.nn.recurrent import (
    RecurrentMixer,
    RecurrentState,
    conv_uniform,
    empty,
    entered,
    step_biases,
)
from lcm.nn.spec import LayerSpec
from lcm.ops.recurrence import op_diag, short_conv
from lcm.ops.recurrence.pieces import in_chunks
from lcm.ops.recurrence.spread import passed_on
from lcm.types import Array, Context, Hidden

FAR = 1e30  # time since another document, of which exp(FAR A) leaves nothing
CHUNK = 64  # tokens whose [E, N] numbers are there at once, where none are given


class Mamba1(RecurrentMixer):
    """Selective state spaces (Gu and Dao, arXiv:2312.00752), of E = expand D channels.

        x = silu(conv(u W_x))             d, b, c = x W_d, x W_bc       of R, N and N numbers
        dt = softplus(d W_dt + dt_bias)                                 one number a channel
        h_t = exp(dt_t A) h_{t-1} + dt_t x_t b_t                        [E, N], A = -exp(A_log)
        y_t = h_t c_t + D x_t             out = (y silu(u W_z)) W_out

    Options: `rank` is R, 0 for D / 16 rounded up; `normed` has d, b and c normalised, with scales,
    as in Jamba (arXiv:2403.19887), or with `scaled=False` without, as in Falcon-Mamba
    (arXiv:2410.05355); `eps` is that of these norms, 0 for the model's `norm_eps`; `clocked` has dt
    multiplied by a parameter of each channel, 1 at first (`lcm.models.distance`).
    """

    EXTENDS = interventions.ALL - {"exact"}  # of a step dt b is written, which is of first order
    OPTIONS: ClassVar[dict[str, Any]] = {
        "normed": False,
        "rank": 0,
        "scaled": True,
        "eps": 0.0,
        "clocked": False,
    }
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {"rank": (0, 1 << 16), "eps": (0.0, 1.0)}

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, inner, rank = spec, spec.inner, _rank(spec)
        self.x = matrix(rngs, spec.width, inner)
        self.z = matrix(rngs, spec.width, inner)
        self.conv = conv_uniform(rngs, spec, spec.conv, 1, inner)
        self.conv_bias = conv_uniform(rngs, spec, inner)
        self.dt_down = matrix(rngs, inner, rank)
        self.bc = matrix(rngs, inner, 2 * spec.state)
        most = rank**-0.5
        dt_up = jax.random.uniform(rngs.params(), (rank, inner), minval=-most, maxval=most)
        self.dt_up = nnx.Param(dt_up)
        self.dt_bias = step_biases(rngs, inner)
        if spec.option("clocked"):
            self.clock = nnx.Param(jnp.ones(inner))
        count = jnp.arange(1, spec.state + 1, dtype=jnp.float32)
        self.A_log = nnx.Param(jnp.tile(jnp.log(count), (inner, 1)))
        self.D = nnx.Param(jnp.ones(inner))
        self.out = matrix(rngs, inner, spec.width, depth=spec.depth)
        if spec.option("normed"):
            norm = RMSNorm if spec.option("scaled") else UnscaledNorm
            eps = spec.option("eps") or spec.norm_eps
            self.dt_norm, self.b_norm, self.c_norm = (
                norm(size, eps) for size in (rank, spec.state, spec.state)
            )

    @staticmethod
    def check(spec: LayerSpec) -> None:
        """Refuses options that nothing would use."""
        unused = not spec.option("scaled") or spec.option("eps")
        if unused and not spec.option("normed"):
            raise ConfigError(
                f"model.options=scaled={spec.option('scaled')},eps={spec.option('eps')} are of "
                "norms that normed=False has not: write normed=True too"
            )

    def __call__(
        self, u_BLD: Hidden, context: Context, state: RecurrentState | None, shared: dict
    ) -> tuple[Hidden, RecurrentState | None]:
        spec = self.spec
        before, reset_BL, there_BL = entered(state, self.init_state(spec, len(u_BLD)), context)
        x_BLE, b_BLN, c_BLN, dt_BLE, tail = self._read(u_BLD, before, reset_BL, there_BL)
        own = spec.extension
        dt_BLE, _ = interventions.scaled(dataclasses.replace(own, retain=1.0), dt_BLE, context)
        y_BLE, h_BEN = selective_scan(
            x_BLE if own.insert == 1 else own.insert * x_BLE,
            dt_BLE,
            -interventions.rate(own, self.A_log[...]),
            b_BLN,
            c_BLN,
            before.memory,
            reset_BL,
            spec.recurrence_chunk or CHUNK,
            there_BL * np.log(own.retain) if own.retain != 1 else None,
            own.window if own.cuts(u_BLD.shape[1]) else 0,
        )
        y_BLE = (y_BLE + self.D[...] * x_BLE).astype(u_BLD.dtype)
        out_BLD = dense(y_BLE * jax.nn.silu(dense(u_BLD, self.z[...])), self.out[...])
        after = RecurrentState(h_BEN, (tail,), before.segment_B)
        return out_BLD, None if state is None else after

    def _read(
        self, u_BLD: Hidden, before: RecurrentState, reset_BL: Array, there_BL: Array
    ) -> tuple[Array, Array, Array, Array, Array]:
        """x, b, c and dt of tokens, and the tail of the convolution behind them."""
        x_BLE, taps, (tail,) = dense(u_BLD, self.x[...]), self.conv[:, 0], before.tails
        x_BLE, tail = short_conv(x_BLE, taps, self.conv_bias[...], tail, reset_BL, there_BL)
        x_BLE = jax.nn.silu(x_BLE)
        b_BLN, c_BLN = jnp.split(dense(x_BLE, self.bc[...]), 2, -1)
        if self.spec.option("normed"):
            b_BLN, c_BLN = self.b_norm(b_BLN), self.c_norm(c_BLN)
        dt_BLE = jnp.where(there_BL[..., None], self._steps(x_BLE), 0)  # padding passes no time
        return x_BLE, b_BLN, c_BLN, dt_BLE, tail

    def _steps(self, x_BLE: Array) -> Array:
        d_BLR = dense(x_BLE, self.dt_down[...])
        d_BLR = self.dt_norm(d_BLR) if self.spec.option("normed") else d_BLR
        dt_BLE = dense(d_BLR, self.dt_up[...]).astype(jnp.float32) + self.dt_bias[...]
        dt_BLE = jax.nn.softplus(dt_BLE)
        return self.clock[...] * dt_BLE if self.spec.option("clocked") else dt_BLE

    def importance(self, u_BLD: Hidden, context: Context) -> Array:
        """The norm of a token's steps, by which DeciMamba ranks, `[B, L]`; of rows without a state
        before them."""
        fresh = entered(None, self.init_state(self.spec, len(u_BLD)), context)
        return jnp.linalg.norm(self._read(u_BLD, *fresh)[3], axis=-1)

    def hidden_attention(self, u_BLD: Hidden, context: Context) -> Array:
        """By what the last token's output, without that of D, has each token's x as a factor,
        float32 `[B, L, E]`; of rows that are one document, without an extension. One of the N
        numbers of a channel after another, as all of them are N times what is given out."""
        fresh = entered(None, self.init_state(self.spec, len(u_BLD)), context)
        _, b_BLN, c_BLN, dt_BLE, _ = self._read(u_BLD, *fresh)
        later_BLE = dt_BLE.sum(1, keepdims=True) - jnp.cumsum(dt_BLE, 1)

        def add(total_BLE: Array, of: tuple[Array, Array, Array]) -> tuple[Array, None]:
            rate_E, b_BL, c_B = of
            alike_BL = (b_BL * c_B[:, None]).astype(jnp.float32)
            return total_BLE + alike_BL[..., None] * jnp.exp(-rate_E * later_BLE), None

        rates_NE = jnp.exp(self.A_log[...]).T
        each = rates_NE, jnp.moveaxis(b_BLN, -1, 0), c_BLN[:, -1].T
        total_BLE, _ = jax.lax.scan(add, jnp.zeros_like(dt_BLE), each)
        return total_BLE * dt_BLE

    @staticmethod
    def init_state(
        spec: LayerSpec, batch: int, length: int = 0, dtype: jnp.dtype | None = None, chunk: int = 0
    ) -> RecurrentState:
        """The empty state, float32 whatever the dtype of caches, for any length."""
        return empty(batch, (spec.inner, spec.state), (spec.inner,), spec.conv)

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass: projections, and the state written and read."""
        per_channel = 3 * spec.width + 2 * _rank(spec) + 2 * spec.state
        return 2 * spec.inner * per_channel + 4 * spec.inner * spec.state


def selective_scan(
    x_BLE: Array,
    dt_BLE: Array,
    A_EN: Array,
    b_BLN: Array,
    c_BLN: Array,
    h0_BEN: Array,
    reset_BL: Array,
    chunk: int,
    log_keep_BL: Array | None = None,
    window: int = 0,
) -> tuple[Array, Array]:
    """`y_t = h_t c_t` float32 `[B, L, E]` of the recurrence of `Mamba1`, and the last state.

    log_keep_BL: what is added to the log-decays of all, if there is such.
    window: how many tokens alone are read, 0 for all.

    What has the size `[B, L, E, N]` is there for one chunk at a time, backward too, which keeps a
    state for each chunk.
    """
    x_BLE, dt_BLE, b_BLN, c_BLN = (
        each.astype(jnp.float32) for each in (x_BLE, dt_BLE, b_BLN, c_BLN)
    )
    # A mask of [C, E, N] from the resets alone would be taken out of the loops, of all tokens.
    since_BLE = jnp.where(reset_BL[..., None], FAR, dt_BLE)
    written = Written(dt_BLE * x_BLE, b_BLN)
    given = Decay(since_BLE, log_keep_BL), written, None, c_BLN
    if window:
        same_BL = interventions.same_document(reset_BL, window)
        gone = jax.tree.map(lambda x: interventions.delayed(x, window), written)
        gone = gone._replace(x=gone.x * same_BL[..., None])
        passed = jax.tree.map(lambda x: interventions.summed(x, window), Decay(dt_BLE, log_keep_BL))
        given = *given[:2], (passed, gone), c_BLN
    return passed_on(partial(in_chunks, _chunk, chunk), _left, given, A_EN, h0_BEN)


def _left(given: tuple, A_EN: Array) -> Array:
    """What all of the tokens leave of a state, `[B, E, N]`."""
    total = jax.tree.map(lambda x: x.sum(1), given[0])
    return total._replace(time_BCE=jnp.minimum(total.time_BCE, FAR)).of(A_EN)


class Decay(NamedTuple):
    """Log-decays `time A + log_keep`, of which the second need not be there."""

    time_BCE: Array
    log_keep_BC: Array | None

    def of(self, A_EN: Array) -> Array:
        log_BCEN = _outer("...e,en->...en", self.time_BCE, A_EN)
        if self.log_keep_BC is not None:
            log_BCEN += self.log_keep_BC[..., None, None]
        return jnp.exp(log_BCEN)


class Written(NamedTuple):
    """What tokens write: x, which is `[B, C, E]`, times b `[B, C, N]`."""

    x: Array
    b: Array

    def whole(self) -> Array:
        return _outer("bce,bcn->bcen", self.x, self.b)


def _chunk(h_BEN: Array, A_EN: Array, moving: tuple) -> tuple[Array, Array]:
    decay, written, gone, c_BCN = moving
    w_BCEN = written.whole()
    if gone is not None:  # tokens behind the window
        passed, old = gone
        w_BCEN -= old.whole() * passed.of(A_EN)
    h_BCEN, last_BEN = op_diag(decay.of(A_EN), w_BCEN, h_BEN)
    return last_BEN, jnp.einsum("bcen,bcn->bce", h_BCEN, c_BCN)


def _outer(over: str, x: Array, y: Array) -> Array:
    """Products of all pairs. Written as an einsum, whose gradients are einsums: sums over an axis
    of `[B, C, E, N]` in their place take a CPU three times as long."""
    return jnp.einsum(over, x, y, precision=jax.lax.Precision.HIGHEST)


def _rank(spec: LayerSpec) -> int:
    """R: numbers that the steps of all channels are made of."""
    return spec.option("rank") or -(-spec.width // 16)
