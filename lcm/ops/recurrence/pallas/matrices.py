"""The recurrence of a matrix with one decay a head on kernels: layout, grid and gradients.

Arrays have tokens and channels last: q and k `[B, G, L, N]`, v `[B, G, L, R P]` of the R heads of
a group, and what is known of heads `[B, G, M, rows, L]` for M blocks of them, a row a head and one
with the number of a token's document in its chunk. A program has one block of heads and goes over
the chunks; its state stays in vector memory.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcm.ops.recurrence.pallas import matrix_kernels as kernels
from lcm.ops.recurrence.pallas import plan
from lcm.ops.recurrence.pallas.matrix_kernels import Tile
from lcm.ops.tpu import LANES, SUBLANES, parameters
from lcm.types import Array

CHUNK = 128
WIDEST, LARGEST = 512, 1 << 18  # channels of all heads of a block, numbers of their states
LOG2E = 1.4426950408889634


class Given(NamedTuple):
    """What has gradients: q, k `[B, G, L, N]`, v `[B, G, L, R P]`, the natural log_decay and the
    state `[B, G, M, N, R P / M]`."""

    q: Array
    k: Array
    v: Array
    log_decay: Array
    S0: Array


def block(each: int, width: int, states: int) -> int | None:
    """Heads of a group at once: as many as fill the lanes that fit, or None if none do."""
    most = min(WIDEST, LARGEST // states)
    fits = [
        r
        for r in range(1, each + 1)
        if each % r == 0 and r * width <= most and (r == each or r * width % LANES == 0)
    ]
    return max(fits, default=None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(tile: Tile, given: Given, document: Array) -> tuple[Array, Array]:
    """Outputs `[B, G, L, R P]` and the last state; L is a multiple of the chunk.

    log_decay: `[B, G, M, R / M, L]`; document: float32 `[B, L]`, from 0 in each chunk.
    The backward pass keeps the arguments and the states that enter chunks.
    """
    y, last, _ = _forward_call(tile, given, document, keep=False)
    return y, last


def _forward(tile: Tile, given: Given, document: Array) -> tuple[tuple[Array, Array], tuple]:
    y, last, states = _forward_call(tile, given, document, keep=True)
    return (y, last), (given, document, states)


def _backward(tile: Tile, kept: tuple, d_out: tuple[Array, Array]) -> tuple[Given, None]:
    given, document, states = kept
    *found, d_G, d_S0 = _backward_call(tile, given, document, states, *d_out)
    pairs = zip(found[:2], given[:2], strict=True)
    d_q, d_k = (d.sum(2, dtype=jnp.float32).astype(x.dtype) for d, x in pairs)
    return Given(d_q, d_k, found[2], of_log_decay(tile.chunk, d_G), d_S0), None


run.defvjp(_forward, _backward)


def known(chunk: int, log_decay: Array, document: Array, *more: Array) -> Array:
    """Inclusive sums of log-decays in chunks, to base 2, documents, and more, in rows of eights."""
    *outer, heads, length = log_decay.shape
    G = jnp.cumsum(log_decay.reshape(*outer, heads, -1, chunk) * LOG2E, -1)
    rows = jnp.expand_dims(document, range(1, len(outer) + 1))
    rows = jnp.broadcast_to(rows, (*outer, 1, length))
    found = jnp.concatenate([G.reshape(log_decay.shape), rows, *more], -2)
    return jnp.pad(found, [(0, 0)] * len(outer) + [(0, -found.shape[-2] % SUBLANES), (0, 0)])


def of_log_decay(chunk: int, d_G: Array) -> Array:
    """The gradient of log-decays, from that of their inclusive sums in chunks."""
    shape = *d_G.shape[:-1], -1, chunk
    return jax.lax.cumsum(d_G.reshape(shape), axis=d_G.ndim, reverse=True).reshape(d_G.shape)


class _Grid:
    """Blocks of arrays on a grid of (batch, group, block of heads, chunk)."""

    def __init__(self, tile: Tile, given: Given, reverse: bool = False):
        batch, groups, length, width = given.v.shape
        self.tile, self.reverse = tile, reverse
        self.states, self.channels = given.q.shape[-1], tile.heads * tile.width
        self.chunks = length // tile.chunk
        self.shape = batch, groups, width // self.channels, self.chunks

    def at(self, t: Array) -> Array:
        """The chunk of a step."""
        return self.chunks - 1 - t if self.reverse else t

    def known(self, rows: int) -> pl.BlockSpec:
        block = (None, None, None, rows, self.tile.chunk)
        return pl.BlockSpec(block, lambda b, g, m, t: (b, g, m, 0, self.at(t)))

    def q(self) -> pl.BlockSpec:
        block = (None, None, self.tile.chunk, self.states)
        return pl.BlockSpec(block, lambda b, g, m, t: (b, g, self.at(t), 0))

    def v(self) -> pl.BlockSpec:
        block = (None, None, self.tile.chunk, self.channels)
        return pl.BlockSpec(block, lambda b, g, m, t: (b, g, self.at(t), m))

    def d_q(self) -> pl.BlockSpec:
        """A block of heads has its own."""
        block = (None, None, None, self.tile.chunk, self.states)
        return pl.BlockSpec(block, lambda b, g, m, t: (b, g, m, self.at(t), 0))

    def state(self) -> pl.BlockSpec:
        block = (None, None, None, self.states, self.channels)
        return pl.BlockSpec(block, lambda b, g, m, t: (b, g, m, 0, 0))

    def entering(self) -> pl.BlockSpec:
        """The states of all chunks, `[B, G, M, T, N, R P / M]`."""
        block = (None, None, None, None, self.states, self.channels)
        return pl.BlockSpec(block, lambda b, g, m, t: (b, g, m, self.at(t), 0, 0))

    def scratch(self) -> list:
        return [pltpu.VMEM((self.states, self.channels), jnp.float32)]

    def cost(self, squares: int, heads: int, states: int, *arrays: Array) -> pl.CostEstimate:
        """Of so many products of a chunk: C x C x N, C x C x P of each head, C x N x R P."""
        chunk, tile = self.tile.chunk, self.tile
        flops = squares * chunk * self.states + heads * chunk * self.channels
        flops = 2 * chunk * (flops + states * self.states * self.channels)
        programs = math.prod(self.shape)
        return plan.cost(programs * flops, programs * tile.heads * chunk**2, *arrays)


def _forward_call(
    tile: Tile, given: Given, document: Array, keep: bool
) -> tuple[Array, Array, Array | None]:
    """Outputs, the last state, and if they are kept the states that enter chunks."""
    grid = _Grid(tile, given)
    of_heads = known(tile.chunk, given.log_decay, document)
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out = [jax.ShapeDtypeStruct(given.v.shape, given.v.dtype), float32(given.S0.shape)]
    out += [float32((*grid.shape, *given.S0.shape[3:]))] * keep
    arrays = of_heads, given.q, given.k, given.v, given.S0
    y, last, *states = pl.pallas_call(
        functools.partial(kernels.forward, tile),
        grid=grid.shape,
        in_specs=[grid.known(of_heads.shape[3]), grid.q(), grid.q(), grid.v(), grid.state()],
        out_specs=[grid.v(), grid.state(), *[grid.entering()] * keep],
        out_shape=out,
        scratch_shapes=grid.scratch(),
        compiler_params=parameters(3, 1),
        cost_estimate=grid.cost(1, 1, 2, *arrays, *out),
        interpret=plan.interpret,
        name="matrix_forward",
    )(*arrays)
    return y, last, states[0] if keep else None


def _backward_call(
    tile: Tile, given: Given, document: Array, states: Array, d_y: Array, d_last: Array
) -> tuple[Array, ...]:
    """Gradients of q and k by block of heads, of v, of sums of log-decays, and of the state."""
    grid = _Grid(tile, given, reverse=True)
    of_heads = known(tile.chunk, given.log_decay, document)
    blocks, rows = grid.shape[2], of_heads.shape[3]
    batch, groups, *token = given.q.shape
    # Parts of sums that are taken later are float32.
    d_q, d_k = (
        jax.ShapeDtypeStruct(
            (batch, groups, blocks, *token), x.dtype if blocks == 1 else jnp.float32
        )
        for x in given[:2]
    )
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    d_v = jax.ShapeDtypeStruct(given.v.shape, given.v.dtype)
    out = [d_q, d_k, d_v, float32(of_heads.shape), float32(given.S0.shape)]
    arrays = of_heads, given.q, given.k, given.v, states, d_y, d_last
    in_specs = [grid.known(rows), grid.q(), grid.q(), grid.v(), grid.entering(), grid.v()]
    d_q, d_k, d_v, d_known, d_S0 = pl.pallas_call(
        functools.partial(kernels.backward, tile),
        grid=grid.shape,
        in_specs=[*in_specs, grid.state()],
        out_specs=[grid.d_q(), grid.d_q(), grid.v(), grid.known(rows), grid.state()],
        out_shape=out,
        scratch_shapes=grid.scratch(),
        compiler_params=parameters(3, 1),
        cost_estimate=grid.cost(3, 2, 5, *arrays, *out),
        interpret=plan.interpret,
        name="matrix_backward",
    )(*arrays)
    return d_q, d_k, d_v, d_known[..., : tile.heads, :], d_S0
