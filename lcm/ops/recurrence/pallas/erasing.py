"""The recurrence of a matrix that erases, with one decay a head, on kernels: grid and gradients.

Arrays are as layers make them, heads beside each other in lanes: q, k, a, b `[B, L, . N]`, which
heads may share in groups, and v `[B, L, H P]`. What is known of heads is `[B, M, rows, L]` for M
blocks of them, as in `matrices`. A program has one block of heads and goes over the chunks; its
states stay in vector memory.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcm.ops.recurrence.pallas import erasing_kernels as kernels
from lcm.ops.recurrence.pallas import plan, triangles
from lcm.ops.recurrence.pallas.erasing_kernels import Tile, Tokens
from lcm.ops.recurrence.pallas.matrices import known, of_log_decay
from lcm.ops.tpu import LANES, parameters
from lcm.types import Array

CHUNK = 128
HEADS = 4  # of a block at most: while one waits for a product, others go on
WIDEST, LARGEST = 512, 1 << 18  # rows or channels of all of them, numbers of their states


class Given(NamedTuple):
    """What has gradients: tokens `[B, L, . N]` and `[B, L, H P]`, the natural log_decay and the
    rate of erasure `[B, M, H / M, L]`, and the state `[B, H, N, P]`."""

    tokens: Tokens
    log_decay: Array
    rate: Array
    S0: Array


def block(heads: int, states: int, width: int) -> int | None:
    """Heads at once: as many as fit and fill lanes, or None if none do."""
    most = min(HEADS, WIDEST // max(states, width), LARGEST // (states * width))
    fits = [
        m
        for m in range(1, most + 1)
        if heads % m == 0 and all(in_lanes(m, heads, size) for size in (states, width))
    ]
    return max(fits, default=None)


def in_lanes(some: int, heads: int, size: int) -> bool:
    """Whether some of all heads of a size are a block of an array."""
    return some == heads or some * size % LANES == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(tile: Tile, given: Given, document: Array) -> tuple[Array, Array]:
    """Outputs `[B, L, H P]` and the last state; L is a multiple of the chunk.

    document: float32 `[B, L]`, from 0 in each chunk. The backward pass keeps the arguments and the
    states that enter chunks.
    """
    y, last, _ = _forward_call(tile, given, document, keep=False)
    return y, last


def _forward(tile: Tile, given: Given, document: Array) -> tuple[tuple[Array, Array], tuple]:
    y, last, states = _forward_call(tile, given, document, keep=True)
    return (y, last), (given, document, states)


def _backward(tile: Tile, kept: tuple, d_out: tuple[Array, Array]) -> tuple[Given, None]:
    *tokens, d_G, d_rate, d_S0 = _backward_call(tile, *kept, *d_out)
    return Given(Tokens(*tokens), of_log_decay(tile.chunk, d_G), d_rate, d_S0), None


run.defvjp(_forward, _backward)


def _known(tile: Tile, given: Given, document: Array) -> Array:
    return known(tile.chunk, given.log_decay, document, given.rate)


class _Grid:
    """Blocks of arrays on a grid of (batch, block of heads, chunk)."""

    def __init__(self, tile: Tile, given: Given, reverse: bool = False):
        batch, length, _ = given.tokens.v.shape
        self.tile, self.reverse = tile, reverse
        self.blocks, self.chunks = given.log_decay.shape[1], length // tile.chunk
        self.shape = batch, self.blocks, self.chunks

    def at(self, t: Array) -> Array:
        """The chunk of a step."""
        return self.chunks - 1 - t if self.reverse else t

    def tokens(self, x: Array) -> pl.BlockSpec:
        """Those of a block of heads, of `[B, L, ...]`."""
        block = (None, self.tile.chunk, x.shape[2] // self.blocks)
        return pl.BlockSpec(block, lambda b, m, t: (b, self.at(t), m))

    def known(self, rows: int) -> pl.BlockSpec:
        block = (None, None, rows, self.tile.chunk)
        return pl.BlockSpec(block, lambda b, m, t: (b, m, 0, self.at(t)))

    @property
    def _states(self) -> tuple[int, int, int]:
        return self.tile.heads, self.tile.states, self.tile.width

    def state(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, *self._states), lambda b, m, t: (b, m, 0, 0))

    def entering(self) -> pl.BlockSpec:
        """The states of all chunks, `[B, T, H, N, P]`."""
        block = (None, None, *self._states)
        return pl.BlockSpec(block, lambda b, m, t: (b, self.at(t), m, 0, 0))

    def scratch(self) -> list:
        return [pltpu.VMEM(self._states, jnp.float32)]

    def cost(self, squares: int, within: int, states: int, *arrays: Array) -> pl.CostEstimate:
        """Of so many products of a head and chunk: C x C x N, C x C x P, C x N x P, and inverses
        by two products of half the rows from blocks of 16 up."""
        heads, states_, width = self._states
        chunk = self.tile.chunk
        joined = (chunk // triangles.BLOCK).bit_length() - 1
        flops = chunk * (squares * states_ + within * width + joined * chunk)
        flops = 2 * chunk * (flops + states * states_ * width)
        programs = math.prod(self.shape) * heads
        return plan.cost(programs * flops, programs * 2 * chunk**2, *arrays)


def _forward_call(
    tile: Tile, given: Given, document: Array, keep: bool
) -> tuple[Array, Array, Array | None]:
    """Outputs, the last state, and if they are kept the states that enter chunks."""
    grid, of_heads = _Grid(tile, given), _known(tile, given, document)
    tokens, S0 = given.tokens, given.S0
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out = [jax.ShapeDtypeStruct(tokens.v.shape, tokens.v.dtype), float32(S0.shape)]
    out += [float32((len(S0), grid.chunks, *S0.shape[1:]))] * keep
    arrays = of_heads, *tokens, S0
    y, last, *states = pl.pallas_call(
        functools.partial(kernels.forward, tile),
        grid=grid.shape,
        in_specs=[grid.known(of_heads.shape[2]), *map(grid.tokens, tokens), grid.state()],
        out_specs=[grid.tokens(tokens.v), grid.state(), *[grid.entering()] * keep],
        out_shape=out,
        scratch_shapes=grid.scratch(),
        compiler_params=parameters(2, 1),
        cost_estimate=grid.cost(4, 4, 4, *arrays, *out),
        interpret=plan.interpret,
        name="erasing_forward",
    )(*arrays)
    return y, last, states[0] if keep else None


def _backward_call(
    tile: Tile, given: Given, document: Array, states: Array, d_y: Array, d_last: Array
) -> tuple[Array, ...]:
    """Gradients of tokens, of sums of log-decays, of rates, and of the state."""
    grid, of_heads = _Grid(tile, given, reverse=True), _known(tile, given, document)
    tokens = given.tokens
    specs, known_spec = [*map(grid.tokens, tokens)], grid.known(of_heads.shape[2])
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tokens]
    out += [float32(of_heads.shape), float32(given.S0.shape)]
    arrays = of_heads, *tokens, states, d_y, d_last
    *found, d_known, d_S0 = pl.pallas_call(
        functools.partial(kernels.backward, tile),
        grid=grid.shape,
        in_specs=[known_spec, *specs, grid.entering(), grid.tokens(d_y), grid.state()],
        out_specs=[*specs, known_spec, grid.state()],
        out_shape=out,
        scratch_shapes=grid.scratch(),
        compiler_params=parameters(2, 1),
        cost_estimate=grid.cost(12, 10, 9, *arrays, *out),
        interpret=plan.interpret,
        name="erasing_backward",
    )(*arrays)
    return *found, d_known[..., : tile.heads, :], d_known[..., tile.rates, :], d_S0
