"""A grid of programs that go over the chunks of their heads, and a call of a kernel on it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lcm.ops.recurrence.pallas import plan
from lcm.ops.tpu import parameters
from lcm.types import Array

Blocks = Sequence[tuple[Any, pl.BlockSpec]]  # arrays, or their shapes and dtypes, each in blocks

float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """`run(tile, given, document)`: outputs and the last state of kernels with gradients of theirs.

    given: all that has a gradient; document: float32 `[B, L]`, the number of a token's document in
    its chunk, L being a multiple of the chunk. The backward pass keeps both and the states that
    enter chunks.

    forward: `(tile, given, document, keep)` gives outputs, the last state, and if they are kept
        those states.
    backward: `(tile, given, document, states, d_y, d_last)` gives the gradient of `given`.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(tile: Any, given: Any, document: Array) -> tuple[Array, Array]:
        return forward(tile, given, document, keep=False)[:2]

    def kept(tile: Any, given: Any, document: Array) -> tuple[tuple[Array, Array], tuple]:
        y, last, states = forward(tile, given, document, keep=True)
        return (y, last), (given, document, states)

    def pulled(tile: Any, kept: tuple, d_out: tuple[Array, Array]) -> tuple[Any, None]:
        return backward(tile, *kept, *d_out), None

    run.defvjp(kept, pulled)
    return run


class Grid:
    """Of a shape whose last axis is of chunks, which are taken in turn, in reverse from the last.

    tile: what a kernel is told of a program. state: the shape of what stays in vector memory from
    chunk to chunk.
    """

    def __init__(self, tile: Any, shape: tuple[int, ...], state: tuple[int, ...], reverse: bool):
        self.tile, self.shape, self.state_shape = tile, shape, state
        self.chunks, self.reverse = shape[-1], reverse

    def at(self, t: Array) -> Array:
        """The chunk of a step."""
        return self.chunks - 1 - t if self.reverse else t

    def call(
        self, name: str, kernel: Callable, given: Blocks, out: Blocks, work: tuple[int, int]
    ) -> list[Array]:
        """What `kernel(tile, *given, *out, state)` writes.

        work: FLOPs and exponentials of a program.
        """
        arrays, in_specs = zip(*given, strict=True)
        shapes, out_specs = zip(*out, strict=True)
        flops, exponentials = (math.prod(self.shape) * each for each in work)
        return pl.pallas_call(
            functools.partial(kernel, self.tile),
            grid=self.shape,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=shapes,
            scratch_shapes=[pltpu.VMEM(self.state_shape, jnp.float32)],
            compiler_params=parameters(len(self.shape) - 1, 1),
            cost_estimate=plan.cost(flops, exponentials, *arrays, *shapes),
            interpret=plan.interpret,
            name=name,
        )(*arrays)


class HeadGrid(Grid):
    """Of (batch, block of heads, chunk), for tokens `[B, L, ...]` with heads beside each other.

    v: `[B, L, H P]`. state: of one head in vector memory.
    """

    def __init__(self, tile: Any, v: Array, state: tuple[int, int], reverse: bool):
        batch, length, channels = v.shape
        self.blocks = channels // (tile.heads * tile.width)
        shape = batch, self.blocks, length // tile.chunk
        super().__init__(tile, shape, (tile.heads, *state), reverse)

    def tokens(self, x: Array) -> pl.BlockSpec:
        """Those of a block of heads."""
        block = (None, self.tile.chunk, x.shape[2] // self.blocks)
        return pl.BlockSpec(block, lambda b, m, t: (b, self.at(t), m))

    def state(self) -> pl.BlockSpec:
        """Of `[B, H, N, P]`."""
        tile = self.tile
        block = (None, tile.heads, tile.states, tile.width)
        return pl.BlockSpec(block, lambda b, m, t: (b, m, 0, 0))

    def entering(self) -> pl.BlockSpec:
        """The states of all chunks as they are in vector memory, `[B, T, H, ...]`."""
        return pl.BlockSpec(
            (None, None, *self.state_shape), lambda b, m, t: (b, self.at(t), m, 0, 0)
        )
