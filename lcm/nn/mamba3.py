"""Mamba-3 as a mixer: a trapezoid between tokens, and keys that the input turns."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.errors import ConfigError
from lcm.nn import interventions
from lcm.nn.dense import dense, matrix
from lcm.nn.norm import RMSNorm
from lcm.nn.recurrent import (
    RecurrentMixer,
    RecurrentState,
    empty,
    entered,
    moved,
    step_biases,
)
from lcm.nn.spec import LayerSpec
from lcm.ops.recurrence import op_diag, op_matrix
from lcm.types import Array, Context, Hidden

LEAST_DECAY = 1e-4  # of -A


class Mamba3(RecurrentMixer):
    """Mamba-3 (arXiv:2603.15569), of H heads with a state `[N, P]`.

        dt = softplus(u W_dt + dt_bias),  lam = sigmoid(u W_trap),  A = -max(g(u W_a), 1e-4)
        phi_t = phi_{t-1} + pi tanh(u W_angle) dt                by head, for some pairs of N
        k = turn(phi_t)(norm(u W_b) + b_bias),  q = turn(phi_t)(norm(u W_c) + c_bias)
        S_t = exp(dt A) (S_{t-1} + (1 - lam) dt k_{t-1} x_{t-1}^T) + lam dt k_t x_t^T
        out = ((S_t^T q + D x) silu(u W_z)) W_out

    g(x) is 1 + x from 0 on and 1 / (1 - x) below. Option `turned` is the share of N that turns, and
    `normed` puts a norm by head before the gate, for hybrids. There is no convolution.

    With `rank` R > 1 a head has R inputs and outputs (the paper's MIMO): R keys and queries, biases
    for each, and for x, z and the output vectors m of P numbers each,

        x_r = m_x,r x,  z_r = m_z,r z      S_t takes in sum_r k_r x_r^T where it took k x^T
        out = (sum_r m_o,r (S_t^T q_r + D x_r) silu(z_r)) W_out

    at a state of the same size. To `op_matrix` a token is R of them, each a write, so blocks within
    chunks cost R^2 times and the rest R times as much; `recurrence_chunk` counts writes. Pairs that
    turn are (2i, 2i + 1), in the authors' kernels i and i + N / 2, which is an order of N.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"turned": 0.5, "normed": False, "rank": 1}
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {"turned": (0.0, 1.0), "rank": (1, 64)}
    PACED = True
    EXTENDS = interventions.LINEAR

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        rank = spec.option("rank")
        self.spec, inner, keys = spec, spec.inner, rank * spec.groups * spec.state
        self.z = matrix(rngs, spec.width, inner)
        self.x = matrix(rngs, spec.width, inner)
        self.b = matrix(rngs, spec.width, keys)
        self.c = matrix(rngs, spec.width, keys)
        self.dt = matrix(rngs, spec.width, spec.heads)
        self.a = matrix(rngs, spec.width, spec.heads)
        self.trap = matrix(rngs, spec.width, spec.heads)
        self.angle = matrix(rngs, spec.width, _pairs(spec))
        self.dt_bias = step_biases(rngs, spec.heads)
        self.b_norm = RMSNorm(spec.state, 1e-5)
        self.c_norm = RMSNorm(spec.state, 1e-5)
        each = () if rank == 1 else (rank,)
        self.b_bias = nnx.Param(jnp.ones((*each, spec.heads, spec.state)))
        self.c_bias = nnx.Param(jnp.ones((*each, spec.heads, spec.state)))
        if rank > 1:
            even = jnp.ones((rank, spec.heads, spec.head_size))
            self.rank_x, self.rank_z = nnx.Param(even / rank), nnx.Param(even)
            self.rank_out = nnx.Param(even / rank)
        self.D = nnx.Param(jnp.ones(spec.heads))
        if spec.option("normed"):
            self.norm = RMSNorm(spec.head_size, spec.norm_eps)
        self.out = matrix(rngs, inner, spec.width, depth=spec.depth)

    @staticmethod
    def check(spec: LayerSpec) -> None:
        """Refuses a share of the state that is no number of pairs."""
        turned = spec.state * spec.option("turned")
        if turned % 2:
            raise ConfigError(
                f"model.options=turned={spec.option('turned')} of model.state={spec.state} turns "
                f"{turned:g} numbers, which are no pairs: choose a share that makes them even"
            )

    def __call__(
        self, u_BLD: Hidden, context: Context, state: RecurrentState | None, shared: dict
    ) -> tuple[Hidden, RecurrentState | None]:
        spec, (batch, length) = self.spec, u_BLD.shape[:2]
        before, reset_BL, there_BL = entered(state, self.init_state(spec, batch), context)
        wide = lambda name: dense(u_BLD, getattr(self, name)[...]).astype(jnp.float32)  # noqa: E731
        dt_BLH = jax.nn.softplus(wide("dt") + self.dt_bias[...])
        dt_BLH = jnp.where(there_BL[..., None], dt_BLH, 0)  # padding passes no time
        if context.pace_BL is not None:
            dt_BLH *= context.pace_BL[..., None]
        own_BLH = jax.nn.sigmoid(wide("trap"))
        log_decay = -jnp.maximum(_positive(wide("a")), LEAST_DECAY) * dt_BLH
        slowed_BLH = spec.extension.step * dt_BLH  # a clock that is slowed turns less, too
        turns = _turns(before.memory["angle"], wide("angle"), slowed_BLH, reset_BL)
        at_once = context._replace(pace_BL=None)
        log_decay, gain = interventions.scaled(spec.extension, log_decay, at_once)
        dt_BLH *= gain
        k, q = (_turned(self._by_head(name, u_BLD), turns[:, :, None]) for name in "bc")
        x_BLHP = dense(u_BLD, self.x[...]).reshape(batch, length, spec.heads, -1)

        # What a token finds is of the tokens before it: of the last of them, its own write and the
        # trapezoid's other half. So no token depends on the next, not even by a rounding.
        moved_by_head = lambda x, tail: _moved(x, tail, reset_BL, there_BL)  # noqa: E731
        (k_before, k_tail), (x_before, x_tail) = map(moved_by_head, (k, x_BLHP), before.tails)
        written_BLH = own_BLH * dt_BLH
        share = jnp.pad(written_BLH[:, :-1], ((0, 0), (1, 0), (0, 0))) + (1 - own_BLH) * dt_BLH
        weight = (jnp.exp(log_decay) * share)[:, :, None, :, None]
        v_before = (self._each(x_before) * weight).astype(x_BLHP.dtype)
        found, S_BHNP = _recurrence(
            q, k_before, v_before, log_decay, before.memory["S"], reset_BL, spec.recurrence_chunk
        )
        x = self._each(x_BLHP)
        if spec.extension.cuts(length):
            found -= self._behind(
                q, k_before, v_before, k, x * written_BLH[:, :, None, :, None], log_decay, reset_BL
            )
        skip = self.D[...] * jnp.eye(x.shape[2])[..., None]
        y = found + _read(_scores(q, k) * written_BLH[:, :, None, None] + skip, x)
        y = y.astype(x_BLHP.dtype)
        y = self.norm(y) if spec.option("normed") else y
        out_BLD = dense(self._gated(y, dense(u_BLD, self.z[...])), self.out[...])

        last_BH11 = _last(written_BLH, there_BL)[:, None, :, None, None]
        k_last = k_tail.reshape(batch, -1, spec.heads, spec.state, 1)
        x_last = self._each(x_tail.reshape(batch, 1, spec.heads, -1))[:, 0, :, :, None]
        S_BHNP += (last_BH11 * k_last * x_last).sum(1)
        memory = {"S": S_BHNP, "angle": jnp.angle(turns[:, -1])}
        after = RecurrentState(memory, (k_tail, x_tail), before.segment_B)
        return out_BLD, None if state is None else after

    def _behind(
        self,
        q: Array,
        k_before: Array,
        v_before: Array,
        k: Array,
        v: Array,
        log_decay: Array,
        reset_BL: Array,
    ) -> Array:
        """What queries find that has been written before the window, `[B, L, R, H, P]`.

        That is what the token `window` before had found, and its own write. The half of it that the
        next token has written stays: it is a write of that token.
        """
        by, same = self.spec.extension.window, interventions.same_document
        left_BLH = jnp.exp(interventions.summed(log_decay, by)) * same(reset_BL, by)[..., None]
        old = lambda x: interventions.delayed(x.astype(jnp.float32), by)  # noqa: E731
        left = left_BLH[:, :, None, :, None]
        nothing = jnp.zeros((len(q), self.spec.heads, self.spec.state, v.shape[-1]))
        found, _ = _recurrence(
            q,
            old(k_before),
            old(v_before) * left,
            log_decay,
            nothing,
            reset_BL,
            self.spec.recurrence_chunk,
        )
        return found + _read(_scores(q, old(k)), old(v) * left)

    def _by_head(self, name: str, u_BLD: Hidden) -> Array:
        """b or c, normalised and with the biases of heads, `[B, L, R, H, N]`."""
        spec, x = self.spec, dense(u_BLD, getattr(self, name)[...])
        x = x.reshape(*x.shape[:2], spec.option("rank"), spec.groups, -1)
        x = jnp.repeat(getattr(self, f"{name}_norm")(x), spec.heads // spec.groups, 3)
        return x + getattr(self, f"{name}_bias")[...].astype(x.dtype)

    def _each(self, x_BLHP: Array) -> Array:
        """x as each of the inputs of a head has it, `[B, L, R, H, P]`."""
        x_BL1HP = x_BLHP[:, :, None]
        return x_BL1HP * self.rank_x[...].astype(x_BLHP.dtype) if self._many else x_BL1HP

    def _gated(self, y_BLRHP: Array, z_BLE: Array) -> Hidden:
        """The outputs of each head, times their gates, as one, `[B, L, E]`."""
        if not self._many:
            return y_BLRHP.reshape(z_BLE.shape) * jax.nn.silu(z_BLE)
        z_BL1HP = z_BLE.reshape(*z_BLE.shape[:2], 1, self.spec.heads, -1)
        by_rank = (x[...].astype(z_BLE.dtype) for x in (self.rank_z, self.rank_out))
        z_RHP, out_RHP = by_rank
        return (y_BLRHP * jax.nn.silu(z_BL1HP * z_RHP) * out_RHP).sum(2).reshape(z_BLE.shape)

    @property
    def _many(self) -> bool:
        return self.spec.option("rank") > 1

    @staticmethod
    def init_state(
        spec: LayerSpec, batch: int, length: int = 0, dtype: jnp.dtype | None = None, chunk: int = 0
    ) -> RecurrentState:
        """The empty state, float32 whatever the dtype of caches, for any length.

        The tails are keys and values of the last token, which the next one takes in once more.
        """
        heads, keys = spec.heads, spec.option("rank") * spec.state
        shapes = {"S": (heads, spec.state, spec.head_size), "angle": (heads, _pairs(spec))}
        return empty(batch, shapes, (heads * keys, spec.inner), 2)

    @staticmethod
    def flops(spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass: projections; the state written and read."""
        inner, rank = spec.inner, spec.option("rank")
        columns = 3 * inner + 2 * rank * spec.groups * spec.state + 3 * spec.heads + _pairs(spec)
        return 2 * spec.width * columns + 4 * rank * inner * spec.state


def _recurrence(
    q: Array, k: Array, v: Array, log_decay: Array, S0: Array, reset_BL: Array, chunk: int
) -> tuple[Array, Array]:
    """What each of R queries finds of all writes up to its token's, `[B, L, R, H, P]`, and S.

    q, k, v: `[B, L, R, H, N or P]`. Each write is a token to `op_matrix`, the first of R decays;
    what a query then misses are the writes behind its own.
    """
    batch, length, rank = q.shape[:3]
    flat = lambda x: x.reshape(batch, length * rank, *x.shape[3:])  # noqa: E731
    rest = [(0, 0), (0, 0), (0, rank - 1)]
    decays = flat(jnp.pad(log_decay[:, :, None], [*rest, (0, 0)]))
    resets = flat(jnp.pad(reset_BL[:, :, None], rest))
    found, S = op_matrix(*map(flat, (q, k, v)), decays, S0_BHNP=S0, reset_BL=resets, chunk=chunk)
    found = found.reshape(v.shape)
    if rank == 1:
        return found, S
    behind = jnp.triu(jnp.ones((rank, rank)), 1)[..., None]
    return found + _read(_scores(q, k) * behind, v), S


def _scores(q: Array, k: Array) -> Array:
    """Of each query with each key of its token, float32 `[B, L, R, R, H]`."""
    if q.shape[2] == 1:
        return (q.astype(jnp.float32) * k).sum(-1)[:, :, None]
    # A product of matrices: the sum of products, with its gradients, XLA does not compile on a CPU.
    wide = (x.astype(jnp.float32) for x in (q, k))
    return jnp.einsum("blrhn,blshn->blrsh", *wide, precision=jax.lax.Precision.HIGHEST)


def _read(score_BLRRH: Array, x_BLRHP: Array) -> Array:
    """The sum of a token's x by score, float32 `[B, L, R, H, P]`."""
    if x_BLRHP.shape[2] == 1:
        return score_BLRRH[:, :, 0, ..., None] * x_BLRHP
    wide = x_BLRHP.astype(jnp.float32)
    return jnp.einsum("blrsh,blshp->blrhp", score_BLRRH, wide, precision=jax.lax.Precision.HIGHEST)


def _pairs(spec: LayerSpec) -> int:
    """How many pairs of numbers of the state turn."""
    return int(spec.state * spec.option("turned")) // 2


def _positive(x: Array) -> Array:
    """1 + x from 0 on and 1 / (1 - x) below: smooth at 0, and never 0."""
    return jnp.where(x >= 0, 1 + x, 1 / (1 - jnp.minimum(x, 0)))


def _turns(angle_BHM: Array, rate_BLM: Array, dt_BLH: Array, reset_BL: Array) -> Array:
    """`exp(i phi)`, complex `[B, L, H, M]`: multiplied up, so that no sum of angles grows large."""
    step = jnp.pi * jnp.tanh(rate_BLM)[:, :, None] * dt_BLH[..., None]
    step = jax.lax.complex(jnp.cos(step), jnp.sin(step))
    begun = jax.lax.complex(jnp.cos(angle_BHM), jnp.sin(angle_BHM))
    turns, _ = op_diag(step, jnp.where(reset_BL[..., None, None], step, 0), begun, reset_BL)
    return turns / jnp.abs(turns)  # of a million factors it is off by 1e-3


def _turned(x_BLRHN: Array, turns_BLRHM: Array) -> Array:
    """Pairs (2 i, 2 i + 1) turned, of the first 2 M numbers of N; turns as of x but for M."""
    count = 2 * turns_BLRHM.shape[-1]
    pairs = x_BLRHN[..., :count].astype(jnp.float32).reshape(*x_BLRHN.shape[:-1], -1, 2)
    turned = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * turns_BLRHM
    turned = jnp.stack([turned.real, turned.imag], -1).reshape(*x_BLRHN.shape[:-1], count)
    return jnp.concatenate([turned.astype(x_BLRHN.dtype), x_BLRHN[..., count:]], -1)


def _moved(x_BLHN: Array, tail_B1C: Array, reset_BL: Array, there_BL: Array) -> tuple[Array, Array]:
    """Each token's predecessor's, and the last one's."""
    flat_BLC = x_BLHN.reshape(*x_BLHN.shape[:2], -1)
    before, tail = moved(flat_BLC, tail_B1C, reset_BL, there_BL)
    return before.reshape(x_BLHN.shape), tail


def _last(x_BLH: Array, there_BL: Array) -> Array:
    """That of the last token of each row that is no padding, 0 where all is."""
    at_B = jnp.where(there_BL, jnp.arange(there_BL.shape[1], dtype=jnp.int32), 0).max(1)
    return jnp.take_along_axis(x_BLH, at_B[:, None, None], 1)[:, 0]  # of padding it is 0
