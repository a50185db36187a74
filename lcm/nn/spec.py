"""What a layer is made of: hashable, so that it can key a compiled function."""

import dataclasses
from typing import Any

from lcm.nn.interventions import Extension
from lcm.ops.attention import Spread
from lcm.positions import Dims, PositionEncoding

SHARED, LATENT = "shared_attention", "latent_attention"
ATTENTION = "attention", SHARED, LATENT


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """The sizes and choices of one kind of layer; the keys of `config.model` give their meaning.

    Those of recurrent layers, from `state` on, are 0 in a layer of attention.
    """

    mixer: str
    mlp: str
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    window: int
    score_cap: float
    score_scale: float
    norm: str
    norm_eps: float
    post_norm: bool
    qk_norm: bool
    parallel: bool
    biases: str
    positions: PositionEncoding
    depth: int
    length: int
    backend: str
    state: int
    conv: int
    expand: float
    groups: int
    recurrence_chunk: int
    options: tuple[tuple[str, Any], ...] = ()
    mlp_options: tuple[tuple[str, Any], ...] = ()
    over: Spread = Spread()  # noqa: RUF009, frozen
    extension: Extension = Extension()  # noqa: RUF009, frozen
    pre_norm: bool = True
    residual_scale: float = 1.0

    @property
    def inner(self) -> int:
        """Channels of a recurrent layer, all heads together."""
        return round(self.width * self.expand)

    def option(self, name: str) -> Any:
        """What a mixer alone has: a key of its `OPTIONS`, and of `model.options`."""
        return dict(self.options)[name]

    def mlp_option(self, name: str) -> Any:
        """What an MLP alone has: a key of its `OPTIONS`, and of `model.mlp_options`."""
        return dict(self.mlp_options)[name]

    @property
    def attends(self) -> bool:
        """Whether its mixer is attention, the one that positions are for."""
        return self.mixer in ATTENTION

    @property
    def shares(self) -> bool:
        """Whether it uses a block of parameters that others use, and writes beside the stream."""
        return self.mixer == SHARED

    @property
    def dims(self) -> Dims:
        """The sizes that positions are for: of latent attention those of the part of keys that
        heads share, half a head where nothing is said."""
        size = self.head_size
        if self.mixer == LATENT:
            size = self.option("shared") or size // 2
        return Dims(self.width, self.heads, self.kv_heads, size, self.length)
