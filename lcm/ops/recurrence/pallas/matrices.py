"""The recurrence of a matrix with one decay a head on kernels: layout, grid and gradients.

Arrays have tokens and channels last: q and k `[B, G, L, N]`, v `[B, G, L, R P]` of the R heads of
a group, and what is known of heads `[B, G, M, rows, L]` for M blocks of them, a row a head and one
with the number of a token's document in its chunk. A program has one block of heads and goes over
the chunks; its state stays in vector memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lcm.ops.recurrence.pallas import matrix_kernels as kernels
from lcm.ops.recurrence.pallas.grid import Grid, differentiable, float32
from lcm.ops.recurrence.pallas.matrix_kernels import LOG2E, Tile
from lcm.ops.tpu import LANES, SUBLANES
from lcm.types import Array

CHUNK = 128
WIDEST, LARGEST = 512, 1 << 18  # channels of all heads of a block, numbers of their states


class Given(NamedTuple):
    """What has gradients: q, k `[B, G, L, N]`, v `[B, G, L, R P]`, the natural log_decay
    `[B, G, M, R / M, L]`, and the state `[B, G, M, N, R P / M]`."""

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


class _Grid(Grid):
    """Blocks of arrays on a grid of (batch, group, block of heads, chunk)."""

    def __init__(self, tile: Tile, given: Given, reverse: bool = False):
        batch, groups, length, width = given.v.shape
        self.states, self.channels = given.q.shape[-1], tile.heads * tile.width
        shape = batch, groups, width // self.channels, length // tile.chunk
        super().__init__(tile, shape, (self.states, self.channels), reverse)

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

    def work(self, squares: int, heads: int, states: int) -> tuple[int, int]:
        """Of so many products of a chunk: C x C x N, C x C x P of each head, C x N x R P."""
        chunk, tile = self.tile.chunk, self.tile
        flops = squares * chunk * self.states + heads * chunk * self.channels
        flops = 2 * chunk * (flops + states * self.states * self.channels)
        return flops, tile.heads * chunk**2


def _forward_call(
    tile: Tile, given: Given, document: Array, keep: bool
) -> tuple[Array, Array, Array | None]:
    """Outputs, the last state, and if they are kept the states that enter chunks."""
    grid = _Grid(tile, given)
    of_heads = known(tile.chunk, given.log_decay, document)
    blocks = grid.known(of_heads.shape[3]), grid.q(), grid.q(), grid.v(), grid.state()
    arrays = of_heads, given.q, given.k, given.v, given.S0
    out = [(jax.ShapeDtypeStruct(given.v.shape, given.v.dtype), grid.v())]
    out += [(float32(given.S0.shape), grid.state())]
    out += [(float32((*grid.shape, *given.S0.shape[3:])), grid.entering())] * keep
    pairs = list(zip(arrays, blocks, strict=True))
    y, last, *states = grid.call("matrix_forward", kernels.forward, pairs, out, grid.work(1, 1, 2))
    return y, last, states[0] if keep else None


def _backward_call(
    tile: Tile, given: Given, document: Array, states: Array, d_y: Array, d_last: Array
) -> Given:
    """Gradients of q and k, which blocks of heads add to, of v, of log-decays, and of the state."""
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
    d_v = jax.ShapeDtypeStruct(given.v.shape, given.v.dtype)
    shapes = d_q, d_k, d_v, float32(of_heads.shape), float32(given.S0.shape)
    arrays = of_heads, given.q, given.k, given.v, states, d_y, d_last
    read = [grid.known(rows), grid.q(), grid.q(), grid.v(), grid.entering(), grid.v(), grid.state()]
    written = [grid.d_q(), grid.d_q(), grid.v(), grid.known(rows), grid.state()]
    d_q, d_k, d_v, d_known, d_S0 = grid.call(
        "matrix_backward",
        kernels.backward,
        list(zip(arrays, read, strict=True)),
        list(zip(shapes, written, strict=True)),
        grid.work(3, 2, 5),
    )
    pairs = zip((d_q, d_k), given[:2], strict=True)
    d_q, d_k = (d.sum(2, dtype=jnp.float32).astype(x.dtype) for d, x in pairs)
    return Given(d_q, d_k, d_v, of_log_decay(tile.chunk, d_known[..., : tile.heads, :]), d_S0)


run = differentiable(_forward_call, _backward_call)  # outputs `[B, G, L, R P]`
