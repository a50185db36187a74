"""Two encodings at once."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax

from lcm.errors import ConfigError
from lcm.ops.attention import Part
from lcm.positions.base import About, Dims, Limit, Params, PositionEncoding
from lcm.types import Attended, Context, Hidden, Keys, Queries, Values


@dataclasses.dataclass(frozen=True)
class Chain(PositionEncoding):
    """`first` on embeddings, inputs of queries and keys, or parts of `second`, which attends.

    Such as a countdown on the input, or a temperature, and RoPE in attention. `first` must have no
    parts of its own: two encodings of the scores do not compose in general, so that is refused,
    not guessed.
    """

    first: PositionEncoding
    second: PositionEncoding
    about: ClassVar = About(
        "Chain",
        "first + second",
        "",
        "none",
        "that of both",
    )

    @property
    def cache(self) -> Literal["rotated", "raw"]:
        return self.second.cache

    @property
    def reach(self) -> tuple[int, int]:
        (a, one), (b, two) = self.first.reach, self.second.reach
        return max(a, b), min(one or two, two or one)

    @property
    def attending(self) -> PositionEncoding:
        return self.second.attending

    def resolved(self, dims: Dims) -> "Chain":
        return Chain(self.first.resolved(dims), self.second.resolved(dims))

    def check(self, dims: Dims) -> None:
        own = [getattr(type(self.first), name) for name in ("keys", "parts", "attend")]
        if own != [getattr(PositionEncoding, name) for name in ("keys", "parts", "attend")]:
            raise ConfigError(
                f"the first of a chain acts on embeddings or adapts the parts of the second, "
                f"{type(self.first).__name__} acts in attention: put it last"
            )
        self.first.check(dims)
        self.second.check(dims)

    def limit(self, dims: Dims) -> int | None:
        limits = [e.limit(dims) for e in (self.first, self.second)]
        return min((n for n in limits if n is not None), default=None)

    def init(self, key: jax.Array, dims: Dims) -> Params:
        one, two = jax.random.split(key)
        return joined(self.first.init(one, dims), self.second.init(two, dims))

    def init_layer(self, key: jax.Array, dims: Dims) -> Params:
        one, two = jax.random.split(key)
        return joined(self.first.init_layer(one, dims), self.second.init_layer(two, dims))

    def adopt(self, params: Params, trained: Params) -> Params:
        first = self.first.adopt(params.get("first", {}), trained.get("first", {}))
        # A model trained with a chain that now has one more in front has no chain inside of one.
        grown = isinstance(self.second, Chain) and "second" not in trained
        second = trained if grown else _of_second(trained)
        return joined(first, self.second.adopt(_of_second(params), second))

    def project(self, params: Params) -> Params:
        first = self.first.project(params.get("first", {}))
        return joined(first, self.second.project(_of_second(params)))

    def embed(self, params: Params, x_BLD: Hidden, context: Context) -> Hidden:
        x_BLD = self.first.embed(params.get("first", {}), x_BLD, context)
        return self.second.embed(_of_second(params), x_BLD, context)

    def infuse(self, params: Params, x_BLD: Hidden, context: Context) -> Hidden:
        x_BLD = self.first.infuse(params.get("first", {}), x_BLD, context)
        return self.second.infuse(_of_second(params), x_BLD, context)

    def keys(self, params: Params, k_BSGK: Keys, k_context: Context) -> Keys:
        return self.second.keys(_of_second(params), k_BSGK, k_context)

    def adapt(self, params: Params, part: Part, q_context: Context, k_context: Context) -> Part:
        part = self.second.adapt(_of_second(params), part, q_context, k_context)
        return self.first.adapt(params.get("first", {}), part, q_context, k_context)

    def parts(
        self,
        params: Params,
        q_BLHK: Queries,
        k_BSGK: Keys,
        q_context: Context,
        k_context: Context,
    ) -> tuple[Part, ...]:
        parts = self.second.parts(_of_second(params), q_BLHK, k_BSGK, q_context, k_context)
        own = params.get("first", {})
        return tuple(self.first.adapt(own, part, q_context, k_context) for part in parts)

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
        own = params.get("first", {})
        return self.second.attend(
            _of_second(params),
            q_BLHK,
            k_BSGK,
            v_BSGK,
            q_context,
            k_context,
            limit=lambda part: limit(self.first.adapt(own, part, q_context, k_context)),
            **options,
        )


def joined(first: Params, second: Params) -> Params:
    """The parameters of `second` as they are, those of `first` under their own name.

    Those of a chain inside of a chain, which has a `first` too, are kept apart as `second`.
    """
    second = {"second": second} if {"first", "second"} & second.keys() else second
    return {"first": first, **second} if first else second


def _of_second(params: Params) -> Params:
    """What `joined` had of the second, of shared parameters, those of a layer, or both."""
    plain = {name: value for name, value in params.items() if name not in ("first", "second")}
    return {**plain, **params.get("second", {})}
