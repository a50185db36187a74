"""The recurrence of a matrix that erases, with one decay a head, on kernels: grid and gradients.

Arrays are as layers make them, heads beside each other in lanes: q, k, a, b `[B, L, . N]`, which
heads may share in groups, and v `[B, L, H P]`. What is known of heads is `[B, M, rows, L]` for M
blocks of them, as in `matrices`. A program has one block of heads and goes over the chunks; its
states stay in vector memory.
"""

from typing import NamedTuple

import jax
from jax.experimental import pallas as pl

from lcm.ops.recurrence.pallas import erasing_kernels as kernels
from lcm.ops.recurrence.pallas import triangles
from lcm.ops.recurrence.pallas.erasing_kernels import Tile, Tokens
from lcm.ops.recurrence.pallas.grid import HeadGrid, differentiable, float32
from lcm.ops.recurrence.pallas.matrices import known, of_log_decay
from lcm.ops.tpu import LANES
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


class _Grid(HeadGrid):
    """Blocks of arrays on a grid of (batch, block of heads, chunk)."""

    def __init__(self, tile: Tile, given: Given, reverse: bool = False):
        super().__init__(tile, given.tokens.v, (tile.states, tile.width), reverse)

    def read(self, given: Given, document: Array) -> list[tuple[Array, pl.BlockSpec]]:
        """What both passes read: what is known of heads, and tokens."""
        of_heads = known(self.tile.chunk, given.log_decay, document, given.rate)
        tokens = [(x, self.tokens(x)) for x in given.tokens]
        return [(of_heads, self.known(of_heads.shape[2])), *tokens]

    def known(self, rows: int) -> pl.BlockSpec:
        block = (None, None, rows, self.tile.chunk)
        return pl.BlockSpec(block, lambda b, m, t: (b, m, 0, self.at(t)))

    def work(self, squares: int, within: int, states: int) -> tuple[int, int]:
        """Of so many products of a head and chunk: C x C x N, C x C x P, C x N x P, and inverses
        by two products of half the rows from blocks of 16 up."""
        heads, rows, width = self.state_shape
        chunk = self.tile.chunk
        joined = (chunk // triangles.BLOCK).bit_length() - 1
        flops = chunk * (squares * rows + within * width + joined * chunk)
        return heads * 2 * chunk * (flops + states * rows * width), heads * 2 * chunk**2


def _forward_call(
    tile: Tile, given: Given, document: Array, keep: bool
) -> tuple[Array, Array, Array | None]:
    """Outputs, the last state, and if they are kept the states that enter chunks."""
    grid = _Grid(tile, given)
    v, S0 = given.tokens.v, given.S0
    out = [(jax.ShapeDtypeStruct(v.shape, v.dtype), grid.tokens(v))]
    out += [(float32(S0.shape), grid.state())]
    out += [(float32((len(S0), grid.chunks, *S0.shape[1:])), grid.entering())] * keep
    pairs = [*grid.read(given, document), (S0, grid.state())]
    y, last, *states = grid.call("erasing_forward", kernels.forward, pairs, out, grid.work(4, 4, 4))
    return y, last, states[0] if keep else None


def _backward_call(
    tile: Tile, given: Given, document: Array, states: Array, d_y: Array, d_last: Array
) -> Given:
    """Gradients of tokens, of log-decays, of rates, and of the state."""
    grid = _Grid(tile, given, reverse=True)
    read = grid.read(given, document)
    of_heads, *tokens = read
    pairs = [*read, (states, grid.entering()), (d_y, grid.tokens(d_y)), (d_last, grid.state())]
    out = [(jax.ShapeDtypeStruct(x.shape, x.dtype), block) for x, block in tokens]
    out += [(float32(of_heads[0].shape), of_heads[1]), (float32(given.S0.shape), grid.state())]
    *tokens, d_known, d_S0 = grid.call(
        "erasing_backward", kernels.backward, pairs, out, grid.work(12, 10, 9)
    )
    d_l = of_log_decay(tile.chunk, d_known[..., : tile.heads, :])
    return Given(Tokens(*tokens), d_l, d_known[..., tile.rates, :], d_S0)


run = differentiable(_forward_call, _backward_call)  # outputs `[B, L, H P]`
