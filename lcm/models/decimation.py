"""Tokens that are left out between layers, so that those above read no more than they know.

DeciMamba (2024, arXiv:2406.14528): a layer that decimates keeps the tokens whose steps are largest,
and the layers after it read a shorter sequence. For reading a prompt in one piece; decoding is as
ever.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.models import decoder
from lcm.models.spec import ModelSpec
from lcm.nn import MIXERS
from lcm.types import Array, Context, Logits, Tokens


class Decimation(NamedTuple):
    """What is kept of a prompt: in the s-th of `layers`, places in the model from 0, as many as
    `max(min(L - R, base beta^s), least)`, and the last R (`response`), which always stay."""

    layers: tuple[int, ...]
    base: int
    beta: float = 0.5
    response: int = 1
    least: int = 20

    def count(self, length: int, number: int) -> int:
        """How many of `length` tokens the decimating layer `number` keeps, response included."""
        before = length - self.response
        kept = max(min(before, int(self.base * self.beta**number)), self.least)
        return self.response + min(kept, before)


def check(spec: ModelSpec, how: Decimation, length: int) -> None:
    """Refuses layers that there are not or that have no steps to go by.

    Raises:
        ConfigError: naming the layer and the remedy.
    """
    if not 1 <= how.response <= length:
        raise ConfigError(
            f"response={how.response} of {length} tokens: keep from 1 to {length} at the end"
        )
    if how.base < 1 or not 0 < how.beta < math.inf or how.least < 1:
        raise ConfigError(
            f"base={how.base}, beta={how.beta}, least={how.least} keep nothing: all are more than "
            "0, and finite"
        )
    if list(how.layers) != sorted(set(how.layers)):
        raise ConfigError(f"layers {how.layers} are not in order: name each once, lowest first")
    for at in how.layers:
        if not 0 <= at < spec.depth:
            raise ConfigError(f"layer {at} is none of {spec.depth}: take 0 to {spec.depth - 1}")
        mixer = spec.layers[at % len(spec.layers)].mixer
        if not hasattr(MIXERS[mixer], "importance"):
            ranked = [name for name, each in MIXERS.items() if hasattr(each, "importance")]
            raise ConfigError(
                f"layer {at} is {mixer}, which has no steps that tokens are ranked by: decimate in "
                f"one of {', '.join(ranked)}"
            )


def read(
    spec: ModelSpec, params: Any, tokens_BL: Tokens, context: Context, how: Decimation
) -> tuple[Logits, Array]:
    """float32 logits `[B, K, V]` of the tokens that come through, and their places `[B, K]`.

    Each row keeps tokens of its own, as many as the others; rows are not to have padding, of which
    the number would differ. The choice has no gradient.

    Raises:
        ConfigError: as `check`.
    """
    length = tokens_BL.shape[1]
    check(spec, how, length)
    shared = decoder.prepared(spec, params.get("positions", {}))
    x_BLD = decoder.embedded(spec, params, tokens_BL, context, shared)
    kept_BL = jnp.broadcast_to(jnp.arange(length), tokens_BL.shape)
    for n, _, run, encoding in decoder.in_turn(spec, params, shared):
        count = how.count(length, how.layers.index(n)) if n in how.layers else length
        if count >= x_BLD.shape[1]:
            x_BLD, _ = run(x_BLD, context, None, encoding)
            continue
        score_BL = run(x_BLD, context, method="importance")
        place_BK = _largest(score_BL, count, how.response)
        # The convolution has seen all tokens, the recurrence sees those that are kept.
        paced = context._replace(pace_BL=_there(x_BLD, place_BK))
        x_BLD, _ = run(x_BLD, paced, None, encoding)
        take = lambda leaf, place=place_BK: jnp.take_along_axis(leaf, place, 1)  # noqa: E731
        x_BLD = jnp.take_along_axis(x_BLD, place_BK[..., None], 1)
        context, kept_BL = jax.tree.map(take, (context, kept_BL))
    return decoder.logits(spec, params, decoder.final_norm(spec, params, x_BLD)), kept_BL


def _largest(score_BL: Array, count: int, response: int) -> Array:
    """Places of the highest scores and of the last tokens, in order, `[B, count]`."""
    length = score_BL.shape[1]
    score_BL = jnp.where(jnp.arange(length) < length - response, score_BL, jnp.inf)
    _, place_BK = jax.lax.top_k(score_BL, count)
    return jnp.sort(place_BK, axis=1)


def _there(x_BLD: Array, place_BK: Array) -> Array:
    """1 at these places and 0 elsewhere, float32 `[B, L]`."""
    zeros_BL = jnp.zeros(x_BLD.shape[:2])
    return jax.vmap(lambda row, at: row.at[at].set(1.0))(zeros_BL, place_BK)
