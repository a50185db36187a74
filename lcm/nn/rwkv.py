"""What all RWKV share: a token mixed with the one before it, and channel mixing."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.nn.dense import dense, orthogonal
from lcm.nn.recurrent import RecurrentMixer, RecurrentState, empty, entered, moved
from lcm.nn.spec import LayerSpec
from lcm.types import Array, Context, Hidden

NORM_EPS = 64e-5  # of the norm by head


class Place(NamedTuple):
    """Where a layer stands among those of its kind, by which its initial values differ.

    share: n / (L - 1), from 0 in the first layer to 1 in the last.
    start: n / L, which is less than 1 in the last.
    """

    share: Array | float
    start: Array | float


MIDDLE = Place(0.5, 0.5)  # that of a layer by itself


def mix(width: int, power: Array | float) -> Array:
    """Shares of the token before, `[D]`: 1 in the first channel and less in each that follows."""
    return 1 - (jnp.arange(width) / width) ** power


def set_initial(mixer: nnx.Module, values: dict[str, Array]) -> None:
    """Makes the parameters of a layer that differ from layer to layer."""
    for name, value in values.items():
        setattr(mixer, name, nnx.Param(value))


def zeros(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape))


def ramp(count: int) -> Array:
    """From 0 in the first channel to 1 in the last."""
    return jnp.arange(count) / max(count - 1, 1)


def mixed(x_BLD: Hidden, dx_BLD: Hidden, share: Array) -> Hidden:
    """The token, and a share of its difference to the one before, in the dtype of the model."""
    return x_BLD + dx_BLD * share.astype(x_BLD.dtype)


class _ChannelMix(RecurrentMixer):
    """Two matrices of `hidden` channels, or 4 D; the only state is the last token."""

    NAMES: ClassVar[tuple[str, ...]]
    POWER: ClassVar[int]

    @classmethod
    def initial(cls, spec: LayerSpec, at: Place) -> dict[str, Array]:
        """Initial values that depend on the layer, by parameter."""
        return {f"mix_{name}": mix(spec.width, (1 - at.start) ** cls.POWER) for name in cls.NAMES}

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, width, hidden = spec, spec.width, _hidden(spec)
        set_initial(self, self.initial(spec, MIDDLE))
        self.k = orthogonal(rngs, width, hidden)
        self.out = zeros(hidden, width)

    def __call__(
        self, u_BLD: Hidden, context: Context, state: RecurrentState | None, shared: dict
    ) -> tuple[Hidden, RecurrentState | None]:
        before, reset_BL, there_BL = entered(state, self.init_state(self.spec, len(u_BLD)), context)
        last_BLD, tail = moved(u_BLD, before.tails[0], reset_BL, there_BL)
        after = RecurrentState({}, (tail,), before.segment_B)
        return self.channels(u_BLD, last_BLD - u_BLD), None if state is None else after

    def channels(self, u_BLD: Hidden, dx_BLD: Hidden) -> Hidden:
        """`relu(x_k W_k)^2 W_out`."""
        k_BLF = dense(mixed(u_BLD, dx_BLD, self.mix_k[...]), self.k[...])
        return dense(jnp.square(jax.nn.relu(k_BLF)), self.out[...])

    @staticmethod
    def init_state(
        spec: LayerSpec, batch: int, length: int = 0, dtype: jnp.dtype | None = None, chunk: int = 0
    ) -> RecurrentState:
        """The empty state, float32 whatever the dtype of caches, for any length."""
        return empty(batch, {}, (spec.width,), 2)

    @classmethod
    def flops(cls, spec: LayerSpec, length: int) -> float:
        """Matmul FLOPs of one token's forward pass."""
        return 2 * spec.width * (2 * _hidden(spec) + spec.width * (len(cls.NAMES) - 1))


class RWKV4Channels(_ChannelMix):
    """The channel mixing of RWKV-4 (Peng et al., arXiv:2305.13048), to stand behind its mixer in
    `model.pattern`, with `model.mlp=none`.

        x_s = x + (x_{t-1} - x) mix_s,  s in k, r
        out = sigmoid(x_r W_r) (relu(x_k W_k)^2 W_out)
    """

    NAMES = ("k", "r")
    POWER = 1

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        super().__init__(spec, rngs)
        self.r = zeros(spec.width, spec.width)

    def channels(self, u_BLD: Hidden, dx_BLD: Hidden) -> Hidden:
        r_BLD = dense(mixed(u_BLD, dx_BLD, self.mix_r[...]), self.r[...])
        return jax.nn.sigmoid(r_BLD) * super().channels(u_BLD, dx_BLD)


class RWKV6Channels(RWKV4Channels):
    """That of RWKV-6 (Peng et al., arXiv:2404.05892), which is that of RWKV-4."""


class RWKV7Channels(_ChannelMix):
    """The channel mixing of RWKV-7 (Peng et al., arXiv:2503.14456), to stand behind its mixer.

    x_k = x + (x_{t-1} - x) mix_k               out = relu(x_k W_k)^2 W_out
    """

    NAMES = ("k",)
    POWER = 4


def _hidden(spec: LayerSpec) -> int:
    return spec.hidden or 4 * spec.width


class TimeMix(RecurrentMixer):
    """A mixer of H heads whose state is a matrix `[N, P]` each, and the last token."""

    spec: LayerSpec

    def by_head(self, x_BLC: Array) -> Array:
        """`[B, L, H N]` as `[B, L, H, N]`."""
        return x_BLC.reshape(*x_BLC.shape[:2], self.spec.heads, -1)

    @staticmethod
    def init_state(
        spec: LayerSpec, batch: int, length: int = 0, dtype: jnp.dtype | None = None, chunk: int = 0
    ) -> RecurrentState:
        """The empty state, float32 whatever the dtype of caches, for any length."""
        return empty(batch, (spec.heads, spec.state, spec.head_size), (spec.width,), 2)
