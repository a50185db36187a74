"""The recurrence of a matrix with a decay for each channel on kernels: grid and gradients.

Arrays are as layers make them, heads beside each other in lanes: log-decays `[B, L, H N]`, q, k
and, of what erases, a, b `[B, L, . N]`, which heads may share in groups, and v `[B, L, H P]`. A
program has one block of heads and goes over the chunks; its states stay in vector memory.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl

from lcm.ops.recurrence.pallas import channel_kernels as kernels
from lcm.ops.recurrence.pallas.channel_kernels import Tokens
from lcm.ops.recurrence.pallas.erasing_kernels import Tile
from lcm.ops.recurrence.pallas.grid import HeadGrid, differentiable, float32
from lcm.types import Array

CHUNK, ERASING = 128, 64  # tokens; of what erases fewer, as its squares are two side by side


class Given(NamedTuple):
    """What has gradients: tokens, whose log-decays are natural, and the state `[B, H, N, P]`."""

    tokens: Tokens
    S0: Array


class _Grid(HeadGrid):
    """Blocks of arrays on a grid of (batch, block of heads, chunk); states are `[P, N]`."""

    def __init__(self, tile: Tile, given: Given, reverse: bool = False):
        super().__init__(tile, given.tokens.v, (tile.width, tile.states), reverse)

    def read(self, given: Given, document: Array) -> list[tuple[Array, pl.BlockSpec]]:
        """What both passes read: documents, and tokens."""
        chunk = self.tile.chunk
        rows = document.reshape(len(document), -1, 1, chunk)
        block = pl.BlockSpec((None, None, 1, chunk), lambda b, m, t: (b, self.at(t), 0, 0))
        tokens = [(x, self.tokens(x)) for x in given.tokens if x is not None]
        return [(rows, block), *tokens]

    def work(self, squares: int, within: int, states: int) -> tuple[int, int]:
        """Of so many products of a head and chunk: C x C x N for halves of each size, with half of
        the rows from 8 up, C x C x P, and C x N x P; and three exponentials for each size."""
        heads, width, rows = self.state_shape
        chunk = self.tile.chunk
        sizes = chunk.bit_length() - 1
        flops = chunk * ((sizes + 3) // 2 * squares * rows + within * width)
        flops += states * rows * width
        return heads * 2 * chunk * flops, heads * 3 * sizes * chunk * rows


def _forward_call(
    tile: Tile, given: Given, document: Array, keep: bool
) -> tuple[Array, Array, Array | None]:
    """Outputs, the last state, and if they are kept the states that enter chunks."""
    grid = _Grid(tile, given)
    v, S0 = given.tokens.v, given.S0
    read = grid.read(given, document)
    out = [(jax.ShapeDtypeStruct(v.shape, v.dtype), grid.tokens(v))]
    out += [(float32(S0.shape), grid.state())]
    kept = len(S0), grid.chunks, S0.shape[1], tile.width, tile.states
    out += [(float32(kept), grid.entering())] * keep
    kernel = functools.partial(kernels.forward, len(read) - 1)
    work = grid.work(1, 1, 2) if given.tokens.a is None else grid.work(4, 4, 4)
    pairs = [*read, (S0, grid.state())]
    y, last, *states = grid.call("channels_forward", kernel, pairs, out, work)
    return y, last, states[0] if keep else None


def _backward_call(
    tile: Tile, given: Given, document: Array, states: Array, d_y: Array, d_last: Array
) -> Given:
    """Gradients of tokens, and of the state."""
    grid = _Grid(tile, given, reverse=True)
    read = grid.read(given, document)
    pairs = [*read, (states, grid.entering()), (d_y, grid.tokens(d_y)), (d_last, grid.state())]
    out = [(jax.ShapeDtypeStruct(x.shape, x.dtype), block) for x, block in read[1:]]
    out += [(float32(given.S0.shape), grid.state())]
    kernel = functools.partial(kernels.backward, len(read) - 1)
    work = grid.work(3, 2, 6) if given.tokens.a is None else grid.work(12, 10, 9)
    *tokens, d_S0 = grid.call("channels_backward", kernel, pairs, out, work)
    return Given(Tokens(*tokens), d_S0)


run = differentiable(_forward_call, _backward_call)  # outputs `[B, L, H P]`
