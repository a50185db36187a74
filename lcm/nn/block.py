"""The mixer table and the residual block around a mixer."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from lcm.nn import recent
from lcm.nn.attention import Attention
from lcm.nn.deltanet import KDA, DeltaNet, GatedDeltaNet
from lcm.nn.experts import Experts, Told
from lcm.nn.gated_conv import GatedConv
from lcm.nn.gla import GLA
from lcm.nn.latent import LatentAttention
from lcm.nn.lru import LRU
from lcm.nn.lstm import LSTM
from lcm.nn.mamba1 import Mamba1
from lcm.nn.mamba2 import Mamba2
from lcm.nn.mamba3 import Mamba3
from lcm.nn.min_rnn import MinGRU, MinLSTM
from lcm.nn.mlp import DENSE, NoMLP
from lcm.nn.mlstm import MLSTM
from lcm.nn.norm import NORMS
from lcm.nn.retention import LinearAttention, RetNet
from lcm.nn.rglru import RGLRU
from lcm.nn.rwkv import RWKV4Channels, RWKV6Channels, RWKV7Channels
from lcm.nn.rwkv4 import RWKV4
from lcm.nn.rwkv6 import RWKV6
from lcm.nn.rwkv7 import RWKV7
from lcm.nn.s4d import S4D
from lcm.nn.s5 import S5
from lcm.nn.shared import ASIDE, SharedAttention
from lcm.nn.slstm import SLSTM
from lcm.nn.spec import LayerSpec
from lcm.ops.attention import Part
from lcm.types import Array, Context, Hidden

# A mixer is a module with `__call__(x_BLD, context, state, shared) -> (y_BLD, state)`, where state
# is a pytree of its own or None and shared holds parameters of the position encoding, and what
# other layers hand on, and with the static methods `init_state`, `whole`, `flops` and `state_bytes`
# of `Attention`. The engine asks of a state what `RecurrentState` has.
MIXERS: dict[str, type[nnx.Module]] = {
    "attention": Attention,
    "shared_attention": SharedAttention,
    "latent_attention": LatentAttention,
    "gated_conv": GatedConv,
    "lru": LRU,
    "lstm": LSTM,
    "mamba1": Mamba1,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "min_gru": MinGRU,
    "min_lstm": MinLSTM,
    "rglru": RGLRU,
    "linear_attention": LinearAttention,
    "retnet": RetNet,
    "gla": GLA,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "kda": KDA,
    "mlstm": MLSTM,
    "rwkv4": RWKV4,
    "rwkv4_channels": RWKV4Channels,
    "rwkv6": RWKV6,
    "rwkv6_channels": RWKV6Channels,
    "rwkv7": RWKV7,
    "rwkv7_channels": RWKV7Channels,
    "s4d": S4D,
    "s5": S5,
    "slstm": SLSTM,
}


MLPS: dict[str, type] = {**DENSE, "experts": Experts}


class Block(nnx.Module):
    """Pre-normalised residual layer: `x + mixer(norm(x))`, then `x + mlp(norm(x))`.

    A parallel one is `x + mixer(norm(x)) + mlp(norm'(x))` (GPT-NeoX, arXiv:2204.06745, section
    2.1). With post-norms what mixer and MLP add is normalised once more (Gemma 2,
    arXiv:2408.00118), or in place of what they read (OLMo 2, arXiv:2501.00656, section 3.2).
    `residual_scale` multiplies what is added. Without an MLP it is the first of the two sums.
    Experts tell their load beside the state that comes as `Told`.
    """

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, norm = spec, NORMS[spec.norm]
        if spec.pre_norm:
            self.mixer_norm = norm(spec.width, spec.norm_eps)
        self.mixer = MIXERS[spec.mixer](spec, rngs)
        self.alone = MLPS[spec.mlp] is NoMLP
        if spec.post_norm:
            self.mixer_post_norm = norm(spec.width, spec.norm_eps)
        if self.alone:
            return
        if spec.pre_norm:
            self.mlp_norm = norm(spec.width, spec.norm_eps)
        self.mlp = MLPS[spec.mlp](spec, rngs)
        if spec.post_norm:
            self.mlp_post_norm = norm(spec.width, spec.norm_eps)

    def __call__(
        self, x_BLD: Hidden, context: Context, state: Any, shared: dict[str, Any]
    ) -> tuple[Hidden, Any]:
        telling, state = isinstance(state, Told), _plain(state)
        read_BLD = x_BLD + shared[ASIDE] if ASIDE in shared else x_BLD
        y_BLD, state = self._mixed(self._normed("mixer_norm", read_BLD), context, state, shared)
        mixed_BLD = x_BLD + self._added("mixer_post_norm", y_BLD)
        if self.alone:
            return mixed_BLD, state
        u_BLD = self._normed("mlp_norm", x_BLD if self.spec.parallel else mixed_BLD)
        if telling:
            y_BLD, load = self.mlp.told(u_BLD, context.segments_BL)
            state = Told(state, load)
        else:
            y_BLD = self.mlp(u_BLD)
        return mixed_BLD + self._added("mlp_post_norm", y_BLD), state

    def _mixed(self, u_BLD: Hidden, *given: Any) -> tuple[Hidden, Any]:
        context, state, shared = given
        if state is not None and self.spec.extension.window:
            return recent.mix(self.mixer, self.spec, u_BLD, context, state, shared)
        return self.mixer(u_BLD, context, state, shared)

    def _normed(self, norm: str, x_BLD: Hidden) -> Hidden:
        """By the norm of a name, if the layer has it."""
        return getattr(self, norm)(x_BLD) if hasattr(self, norm) else x_BLD

    def _added(self, norm: str, y_BLD: Hidden) -> Hidden:
        """What the stream is given of an output."""
        y_BLD, scale = self._normed(norm, y_BLD), self.spec.residual_scale
        return y_BLD * scale if scale != 1 else y_BLD

    def first_values(self, x_BLD: Hidden, context: Context, state: Any) -> Array:
        """What the mixer of a first layer hands on to those of all layers, if it has such."""
        return self.mixer.first_values(self._normed("mixer_norm", x_BLD), context, _plain(state))

    def importance(self, x_BLD: Hidden, context: Context) -> Array:
        """How large the steps of a layer's recurrence are, `[B, L]`, of mixers that have some."""
        return self.mixer.importance(self._normed("mixer_norm", x_BLD), context)

    def hidden_attention(self, x_BLD: Hidden, context: Context) -> Array:
        """What the last token's output has each token as a factor by, of mixers that tell."""
        return self.mixer.hidden_attention(self._normed("mixer_norm", x_BLD), context)

    def parts(self, x_BLD: Hidden, context: Context, shared: dict[str, Any]) -> tuple[Part, ...]:
        """The parts of attention of the layer, for looking at scores."""
        return self.mixer.parts(self._normed("mixer_norm", x_BLD), context, shared)


def _plain(state: Any) -> Any:
    """The mixer's part of a layer's state."""
    return state.state if isinstance(state, Told) else state


class Aside(nnx.Module):
    """A layer that leaves the residual stream as it is: what it gives is for the next one."""

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.mixer = MIXERS[spec.mixer](spec, rngs)

    def __call__(
        self, x_BLD: Hidden, context: Context, state: Any, shared: dict[str, Any]
    ) -> tuple[Hidden, Any]:
        return self.mixer(x_BLD, context, state, shared)


def layer(spec: LayerSpec, rngs: nnx.Rngs) -> nnx.Module:
    """The module of one layer."""
    return (Aside if spec.shares else Block)(spec, rngs)


def init_state(spec: LayerSpec, batch: int, length: int, dtype: jnp.dtype, chunk: int = 0) -> Any:
    """The empty state of one layer for a batch of rows of up to `length` tokens."""
    if spec.extension.window:
        return recent.init_state(spec, batch)
    return MIXERS[spec.mixer].init_state(spec, batch, length, dtype, chunk)


def whole(spec: LayerSpec) -> bool:
    """Whether the state of a layer has all tokens apart: no window's, and no recurrence's."""
    return MIXERS[spec.mixer].whole(spec)


def flops(spec: LayerSpec, length: int) -> float:
    """Matmul FLOPs of one token's forward pass through one layer, mean over `length` tokens."""
    return sum(flops_by_part(spec, length).values())


def flops_by_part(spec: LayerSpec, length: int) -> dict[str, float]:
    """Those of the mixer, by its name, and of the MLP."""
    mixer, mlp = MIXERS[spec.mixer], MLPS[spec.mlp]
    return {spec.mixer: mixer.flops(spec, length), "mlp": mlp.flops(spec)}
