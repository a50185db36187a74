"""The seam between position encodings and everything else."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax

from lcm.errors import ConfigError
from lcm.ops.attention import Part, attend
from lcm.types import Attended, Context, Hidden, Keys, Queries, Values

Params = dict
Limit = Callable[[Part], Part]


class About(NamedTuple):
    """What the reference page says of an encoding (`lcm positions`).

    training: "from scratch" if a model is trained with it, "tune" if a trained model needs a short
        fine-tuning to gain by it, "none" if it serves a trained model as it is.
    cost: beside plain attention.
    """

    title: str
    formula: str
    source: str
    training: Literal["from scratch", "tune", "none"]
    cost: str = "none"


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

    `init` gives parameters that all layers share, `init_layer` those of one layer; all other
    methods receive both in one dict. Keys pass through `keys` before they enter a cache and
    through `parts` after they leave it, so an encoding chooses what a cache holds by where it
    rotates; `cache` declares it. Everything takes explicit positions, so training, chunked prefill
    and decoding are one code.

    What depends on how long a document is takes the tokens of it that are there: all of them in
    one call without a cache, those so far with one.
    """

    cache: ClassVar[Literal["rotated", "raw"]] = "rotated"
    about: ClassVar[About]

    def resolved(self, dims: Dims) -> "PositionEncoding":
        """The encoding with fields that were left to the model, such as the trained length, set.

        Raises:
            ConfigError: for a trained length below 0.
        """
        original = getattr(self, "original", None)
        if original is not None and original < 0:
            raise ConfigError(
                f"model.positions.original={original} is no trained length: give 1 or more, "
                f"or 0 for data.length={dims.length}"
            )
        return dataclasses.replace(self, original=dims.length) if original == 0 else self

    @property
    def attending(self) -> "PositionEncoding":
        """The encoding whose attention it is: itself, or the last of a chain."""
        return self

    @property
    def reach(self) -> tuple[int, int]:
        """How many of the first and of the latest keys a query can see; all of them if 0, 0."""
        return 0, 0

    @property
    def trained(self) -> int:
        """The trained length L, of an encoding that has one.

        Raises:
            ValueError: if it was left to the model and no model has set it.
        """
        if not self.original:
            raise ValueError(
                f"{type(self).__name__}(original=0) takes the trained length from a model: outside "
                "of one set original to it"
            )
        return self.original

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

    def adopt(self, params: Params, trained: Params) -> Params:
        """Fresh parameters, with those of a trained model in their place where they fit."""
        return fitting(params, trained)

    def project(self, params: Params) -> Params:
        """Parameters of `init` or `init_layer` within their limits, after each optimiser step."""
        return params

    def prepare(self, params: Params) -> Params:
        """Parameters of `init` with what follows from them, once for all layers."""
        return params

    def embed(self, params: Params, x_BLD: Hidden, context: Context) -> Hidden:
        """The embeddings with what the encoding adds to them."""
        return x_BLD

    def infuse(self, params: Params, x_BLD: Hidden, context: Context) -> Hidden:
        """What queries and keys, but not values, of a layer are projected from."""
        return x_BLD

    def keys(self, params: Params, k_BSGK: Keys, k_context: Context) -> Keys:
        """Keys as a cache holds them."""
        return k_BSGK

    def adapt(self, params: Params, part: Part, q_context: Context, k_context: Context) -> Part:
        """A part of another encoding, changed: a temperature, or a mask of its own."""
        return part

    def parts(
        self,
        params: Params,
        q_BLHK: Queries,
        k_BSGK: Keys,
        q_context: Context,
        k_context: Context,
    ) -> tuple[Part, ...]:
        """The parts of attention, for queries as projected and keys as cached."""
        return (self.adapt(params, Part(q_BLHK, k_BSGK), q_context, k_context),)

    def attend(
        self,
        params: Params,
        q_BLHK: Queries,
        k_BSGK: Keys,
        v_BSGK: Values,
        q_context: Context,
        k_context: Context,
        *,
        limit: Limit = lambda part: part,
        **options: Any,
    ) -> Attended:
        """Attention by `parts`, each limited by what the layer asks for: its window, its cap.

        Only an encoding that reads scores or chooses keys does otherwise. `options` are those of
        `lcm.ops.attention.attend`.
        """
        parts = self.parts(params, q_BLHK, k_BSGK, q_context, k_context)
        return attend([limit(p) for p in parts], v_BSGK, q_context, k_context, **options)


def fitting(fresh: Params, trained: Params) -> Params:
    """`fresh` with leaves of `trained` that have the same path and shape."""
    chosen = dict(fresh)
    for name in fresh.keys() & trained.keys():
        new, old = fresh[name], trained[name]
        if isinstance(new, dict) and isinstance(old, dict):
            chosen[name] = fitting(new, old)
        elif not isinstance(new, dict) and getattr(old, "shape", None) == new.shape:
            chosen[name] = old
    return chosen
