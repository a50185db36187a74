"""Two encodings at once."""

import dataclasses
from typing import Literal

import jax

from lcm.errors import ConfigError
from lcm.ops.attention import Part
from lcm.positions.base import Dims, Params, PositionEncoding
from lcm.types import Context, Hidden, Keys, Queries


@dataclasses.dataclass(frozen=True)
class Chain(PositionEncoding):
    """`first` on the embeddings, then `second` on both; attention is left to `second`.

    Such as a countdown on the input and RoPE in attention. `first` must not act in attention:
    two encodings of the scores do not compose in general, so that is refused, not guessed.
    """

    first: PositionEncoding
    second: PositionEncoding

    @property
    def cache(self) -> Literal["rotated", "raw"]:
        return self.second.cache

    def check(self, dims: Dims) -> None:
        if type(self.first).parts is not PositionEncoding.parts:
            raise ConfigError(
                f"the first of a chain acts on the embeddings alone, {type(self.first).__name__} "
                "acts in attention: put it second"
            )
        self.first.check(dims)
        self.second.check(dims)

    def limit(self, dims: Dims) -> int | None:
        limits = [e.limit(dims) for e in (self.first, self.second)]
        return min((n for n in limits if n is not None), default=None)

    def init(self, key: jax.Array, dims: Dims) -> Params:
        one, two = jax.random.split(key)
        return _both(self.first.init(one, dims), self.second.init(two, dims))

    def init_layer(self, key: jax.Array, dims: Dims) -> Params:
        return self.second.init_layer(key, dims)

    def embed(self, params: Params, x_BLD: Hidden, context: Context) -> Hidden:
        x_BLD = self.first.embed(params.get("first", {}), x_BLD, context)
        return self.second.embed(params, x_BLD, context)

    def keys(self, params: Params, k_BSGK: Keys, k_context: Context) -> Keys:
        return self.second.keys(params, k_BSGK, k_context)

    def parts(
        self,
        params: Params,
        q_BLHK: Queries,
        k_BSGK: Keys,
        q_context: Context,
        k_context: Context,
    ) -> tuple[Part, ...]:
        return self.second.parts(params, q_BLHK, k_BSGK, q_context, k_context)


def _both(first: Params, second: Params) -> Params:
    """The parameters of `second` as they are, those of `first` under their own name."""
    return {"first": first, **second} if first else second
