"""What a layer is made of: hashable, so that it can key a compiled function."""

import dataclasses

from lcm.positions import Dims, PositionEncoding


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """The sizes and choices of one kind of layer; the keys of `config.model` give their meaning."""

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

    @property
    def dims(self) -> Dims:
        return Dims(self.width, self.heads, self.kv_heads, self.head_size, self.length)
