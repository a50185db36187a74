"""`h_t = a_t h_{t-1} + b_t` on the vector unit of a TPU, in one pass over memory.

Channels are lanes and tokens are sublanes, as arrays lie in memory. Eight tokens, a register, are
scanned in three rounds, all registers of a row of channels beside each other; the state, repeated
along sublanes, then goes through their decays. That is 6 bundles a register, of 8 x 128 entries,
where a step for each token takes 10, and memory, the bound of both, 9 to 22 by generation.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcm.ops.recurrence.pallas import plan
from lcm.ops.recurrence.pallas.plan import Ref
from lcm.ops.tpu import SUBLANES, parameters
from lcm.types import Array

WIDEST, TOKENS = 1024, 256  # channels and tokens of a tile
ROWS = 32  # tokens of a turn of the loop, whole registers of any dtype


@jax.custom_vjp
def states(a_BLD: Array, b_BLD: Array, h0_BD: Array) -> Array:
    """All `h_t`, float32 `[B, L, D]`, of real `a` and `b`, and of `h0` before the first.

    The backward pass keeps `a` and what is given out.
    """
    return scan(a_BLD, b_BLD, h0_BD)


def _forward(a_BLD: Array, b_BLD: Array, h0_BD: Array) -> tuple[Array, tuple]:
    h_BLD = scan(a_BLD, b_BLD, h0_BD)
    # The dtype of b, which only its gradient needs, goes along in an array of nothing.
    return h_BLD, (a_BLD, jnp.zeros(0, b_BLD.dtype), h0_BD, h_BLD)


def _backward(kept: tuple, d_BLD: Array) -> tuple[Array, Array, Array]:
    """`g_t = dh_t + a_{t+1} g_{t+1}`, `db = g`, `da_t = g_t h_{t-1}`, `dh_0 = a_1 g_1`."""
    a_BLD, b, h0_BD, h_BLD = kept
    g_BLD = scan(a_BLD, d_BLD, jnp.zeros_like(h0_BD), reverse=True)
    before_BLD = jnp.concatenate([h0_BD[:, None], h_BLD[:, :-1]], 1)
    d_h0 = a_BLD[:, 0].astype(jnp.float32) * g_BLD[:, 0]
    return (g_BLD * before_BLD).astype(a_BLD.dtype), g_BLD.astype(b.dtype), d_h0


states.defvjp(_forward, _backward)


def scan(a_BLD: Array, b_BLD: Array, start_BD: Array, reverse: bool = False) -> Array:
    """The kernel, float32 `[B, L, D]`.

    reverse: `g_t = b_t + a_{t+1} g_{t+1}` from the end, where `start` is what is added last.
    """
    batch, length, width = b_BLD.shape
    tokens = min(TOKENS, -(-length // ROWS) * ROWS)
    columns = plan.block(width, WIDEST)
    steps = pl.cdiv(length, tokens)
    out = jax.ShapeDtypeStruct(b_BLD.shape, jnp.float32)
    start_B1D = start_BD[:, None]

    def place(b: Array, d: Array, t: Array) -> tuple:
        return b, steps - 1 - t if reverse else t, d

    tile = pl.BlockSpec((None, tokens, columns), place)
    return pl.pallas_call(
        functools.partial(_kernel, length, reverse),
        grid=(batch, pl.cdiv(width, columns), steps),
        in_specs=[tile, tile, pl.BlockSpec((None, 1, columns), lambda b, d, t: (b, 0, d))],
        out_specs=tile,
        out_shape=out,
        scratch_shapes=[pltpu.VMEM((SUBLANES, columns), jnp.float32)],
        compiler_params=parameters(2, 1),
        cost_estimate=plan.cost(2 * b_BLD.size, 0, a_BLD, b_BLD, start_B1D, out),
        interpret=plan.interpret,
        name="diagonal_from_the_end" if reverse else "diagonal",
    )(a_BLD, b_BLD, start_B1D)


def _kernel(length: int, reverse: bool, a: Ref, b: Ref, start: Ref, h: Ref, state: Ref) -> None:
    tokens = b.shape[0]
    step, loops = pl.program_id(2), tokens // ROWS

    @pl.when(step == 0)
    def _():
        state[...] = jnp.broadcast_to(start[...], state.shape)

    tile = (pl.num_programs(2) - 1 - step if reverse else step) * tokens
    whole = length % tokens == 0 or not reverse  # behind the end nothing is read again

    def rows(n: Array, state: Array) -> Array:
        first = (loops - 1 - n if reverse else n) * ROWS
        own = range(0, ROWS, SUBLANES)
        at_once = pl.ds(pl.multiple_of(first, ROWS), ROWS)
        all_a, all_b = (x[at_once].astype(jnp.float32) for x in (a, b))
        found = {}
        for at in reversed(own) if reverse else own:
            eight = slice(at, at + SUBLANES)
            left = None if whole else length - tile - first - at
            found[at], state = _eight(all_a[eight], all_b[eight], state, reverse, left)
        h[at_once] = jnp.concatenate([found[at] for at in own])
        return state

    state[...] = jax.lax.fori_loop(0, loops, rows, state[...])


def _eight(
    a: Array, b: Array, state: Array, reverse: bool, left: Array | None
) -> tuple[Array, Array]:
    """Eight tokens `[8, D]`, of which so many are left, and the state behind them, repeated.

    From the end `c_t = a_t g_t` is the recurrence, of `a b`, and `g_t = b_t + c_{t+1}`.
    """
    row = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0)
    if left is not None:
        a, b = jnp.where(row < left, a, 1), jnp.where(row < left, b, 0)

    def moved(x: Array, by: int, fill: Array | float) -> Array:
        """The rows that come `by` earlier in the order of the recurrence."""
        inside = row < SUBLANES - by if reverse else row >= by
        return jnp.where(inside, pltpu.roll(x, SUBLANES - by if reverse else by, 0), fill)

    decay, own = a, a * b if reverse else b
    for by in (1, 2, 4):
        decay, own = decay * moved(decay, by, 1), decay * moved(own, by, 0) + own
    found = decay * state + own
    last = found[:1] if reverse else found[SUBLANES - 1 :]
    out = b + moved(found, 1, state) if reverse else found
    return out, jnp.broadcast_to(last, a.shape)
