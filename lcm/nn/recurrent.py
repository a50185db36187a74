"""What recurrent mixers share: the state of a row whatever its length, and convolutions."""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcm.nn.spec import LayerSpec
from lcm.ops.recurrence import boundaries, short_conv
from lcm.types import Array, Context, Hidden


class RecurrentMixer(nnx.Module):
    """A mixer whose state has one size at any length: it keeps no token apart.

    `EXTENDS` names what `lcm.nn.interventions` may do to its recurrence.
    """

    EXTENDS: ClassVar[frozenset[str]] = frozenset()

    @staticmethod
    def whole(spec: LayerSpec) -> bool:
        return False

    @staticmethod
    def state_bytes(spec: LayerSpec, itemsize: int) -> int:
        """Bytes by which the state grows with a token: none."""
        return 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentState:
    """What a recurrent layer keeps of each row; padding (segment 0) leaves it as it is.

    memory: float32 `[B, ...]`, the state of the recurrence, or a tree of such.
    tails: float32 `[B, W - 1, C]`, the last inputs of each convolution, which it holds exactly.
    segment_B: int32, the segment of the last token, 0 before the first: a token of another segment
        begins anew.
    """

    memory: Any
    tails: tuple[Array, ...]
    segment_B: Array

    def longer(self, slots: int) -> Self:
        """The same: any number of tokens has room in it."""
        return self

    def first(self, count: Array | int) -> Self:
        """The same: it cannot go back, and must not be asked for fewer tokens than it has."""
        return self

    def rows(self, row_R: Array) -> Self:
        """Some rows, in any order, any of them more than once."""
        return jax.tree.map(lambda x: x[row_R], self)

    def insert(self, row: Array | int, one: Self, start: Array | int, count: Array | int) -> Self:
        """The state with the only row of another one, which is one document, in place of a row."""
        one = dataclasses.replace(one, segment_B=jnp.minimum(one.segment_B, 1))
        return jax.tree.map(lambda mine, other: mine.at[row].set(other[0]), self, one)


def empty(
    batch: int,
    memory: tuple[int, ...] | dict[str, tuple[int, ...]],
    channels: tuple[int, ...],
    conv: int,
) -> RecurrentState:
    """The state before the first token, of a shape or of several by name, without that of rows;
    `channels` of each convolution, of `conv` taps."""

    def zeros(shape: tuple[int, ...]) -> Array:
        return jnp.zeros((batch, *shape))

    many = isinstance(memory, dict)
    memory = {name: zeros(shape) for name, shape in memory.items()} if many else zeros(memory)
    tails = tuple(zeros((conv - 1, each)) for each in channels)
    return RecurrentState(memory, tails, jnp.zeros(batch, jnp.int32))


def entered(
    state: Any, fresh: RecurrentState, context: Context
) -> tuple[RecurrentState, Array, Array]:
    """The state that a call begins with, where documents begin in it, and where no padding is.

    The state is of the last token already as far as its segment goes.

    Raises:
        ValueError: for a state that another layer has made.
    """
    state = fresh if state is None else state
    found, wanted = jax.tree.map(jnp.shape, state), jax.tree.map(jnp.shape, fresh)
    if found != wanted:
        raise ValueError(
            f"the state {_told(state)} is of another config, this layer has "
            f"{_told(fresh)}: make it with init_state of this config"
        )
    reset_BL, segment_B = boundaries(context.segments_BL, state.segment_B)
    return dataclasses.replace(state, segment_B=segment_B), reset_BL, context.segments_BL > 0


def _told(state: Any) -> str:
    shapes = ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(state))
    return f"{type(state).__name__}({shapes})"


def moved(x_BLD: Hidden, tail_B1D: Array, reset_BL: Array, there_BL: Array) -> tuple[Hidden, Array]:
    """What each token's predecessor in its document has, 0 for the first, and the last one's: the
    token shift of RWKV (arXiv:2305.13048)."""
    width = x_BLD.shape[-1]
    taps_2D = jnp.stack([jnp.ones(width), jnp.zeros(width)])
    return short_conv(x_BLD, taps_2D, jnp.zeros(width), tail_B1D, reset_BL, there_BL)


def conv_uniform(rngs: nnx.Rngs, spec: LayerSpec, *shape: int) -> nnx.Param:
    """Taps or biases of a convolution, within 1 / sqrt(W) of 0."""
    most = spec.conv**-0.5
    return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-most, maxval=most))


def step_biases(rngs: nnx.Rngs, count: int) -> nnx.Param:
    """Biases whose softplus, the time step dt of Mamba, is log-uniform from 0.001 to 0.1."""
    low, high = np.log(1e-3), np.log(1e-1)
    dt = jnp.exp(jax.random.uniform(rngs.params(), (count,), minval=low, maxval=high))
    dt = jnp.maximum(dt, 1e-4)
    return nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))
