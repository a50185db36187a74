"""The seam between position encodings and everything else."""

import dataclasses
from typing import ClassVar, Literal

import jax

from lcm.ops.attention import Part
from lcm.types import Context, Hidden, Keys, Queries

Params = dict


@dataclasses.dataclass(frozen=True)
class Dims:
    """The sizes of the model that an encoding may depend on; `length` is the training length."""

    width: int
    heads: int
    kv_heads: int
    head_size: int
    length: int


@dataclasses.dataclass(frozen=True)
class PositionEncoding:
    """What a position does to embeddings, to keys, and to attention; this class does nothing.

    `init` gives parameters that all layers share, `init_layer` those of one layer; `keys` and
    `parts` receive both in one dict. Keys pass through `keys` before they enter a cache and
    through `parts` after they leave it, so an encoding chooses what a cache holds by where it
    rotates; `cache` declares it. Everything takes explicit positions, so training, chunked prefill
    and decoding are one code.
    """

    cache: ClassVar[Literal["rotated", "raw"]] = "rotated"

    def check(self, dims: Dims) -> None:
        """Raises ConfigError if the encoding cannot serve a model of these sizes."""

    def limit(self, dims: Dims) -> int | None:
        """The longest sequence the encoding can place, `None` if there is none."""
        return None

    def init(self, key: jax.Array, dims: Dims) -> Params:
        """Parameters shared by all layers."""
        return {}

    def init_layer(self, key: jax.Array, dims: Dims) -> Params:
        """Parameters of one attention layer."""
        return {}

    def embed(self, params: Params, x_BLD: Hidden, context: Context) -> Hidden:
        """The embeddings with what the encoding adds to them."""
        return x_BLD

    def keys(self, params: Params, k_BSGK: Keys, k_context: Context) -> Keys:
        """Keys as a cache holds them."""
        return k_BSGK

    def parts(
        self,
        params: Params,
        q_BLHK: Queries,
        k_BSGK: Keys,
        q_context: Context,
        k_context: Context,
    ) -> tuple[Part, ...]:
        """The parts of attention, for queries as projected and keys as cached."""
        return (Part(q_BLHK, k_BSGK),)
