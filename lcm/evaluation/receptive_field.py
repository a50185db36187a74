"""How far a relative bias lets a model see, by its sum and by experiment (arXiv:2307.10156)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm import models
from lcm.errors import ConfigError
from lcm.models import ModelSpec, decoder
from lcm.ops import attention
from lcm.ops.attention import Part
from lcm.ops.losses import cross_entropy
from lcm.positions import Chain, PositionEncoding
from lcm.positions.base import Dims, Params
from lcm.types import Array, Batch, Context

DISTANCES = 1 << 20  # that are summed
GROWTH = 1.5  # of the field by twice the distances, from which on the sum counts as divergent


def bias_weights(
    encoding: PositionEncoding, params: Params, heads: int, distances: int = DISTANCES
) -> np.ndarray:
    """`exp(r_h(n))` for distances n = 0 .. distances - 1, float64 `[H, distances]`.

    r is what the encoding adds to a score of 0 for the last of so many tokens.

    Raises:
        ConfigError: if the encoding has no bias, or several parts.
    """
    zeros = jnp.zeros((1, 1, heads, 2))
    where = lambda n: Context(*(jnp.full((1, 1), x, jnp.int32) for x in (n, 1, -1)))  # noqa: E731
    parts = encoding.parts(params, zeros, zeros, where(1), where(0))
    if len(parts) != 1 or parts[0].score_mod is None:
        raise ConfigError(
            f"{type(encoding).__name__} adds no bias to scores, so it has no theoretical receptive "
            "field: measure the empirical one"
        )
    head = jnp.arange(heads)[:, None]
    last, k_pos = jnp.asarray(distances - 1), distances - 1 - jnp.arange(distances)
    bias = parts[0].score_mod(jnp.zeros((heads, distances)), last, k_pos, head)
    return np.exp(np.asarray(bias, np.float64))


def theoretical_receptive_field(weights_HN: np.ndarray, eps: float) -> np.ndarray:
    """Smallest w with `sum_{n >= w} b_n < eps sum_n b_n` for each head; inf if the sum diverges.

    A sum counts as divergent if w grows by half or more with twice the distances summed, as that of
    a constant tail does.
    """
    half = _field(weights_HN[:, : weights_HN.shape[1] // 2], eps)
    whole = _field(weights_HN, eps)
    return np.where(whole > GROWTH * half, np.inf, whole)


def _field(weights_HN: np.ndarray, eps: float) -> np.ndarray:
    tails = np.cumsum(weights_HN[:, ::-1], axis=1)[:, ::-1]
    below = tails < eps * tails[:, :1]
    return np.where(below.any(1), below.argmax(1), weights_HN.shape[1]).astype(float)


def empirical_receptive_field(cfg: Any, params: Any, batch: Batch, eps: float) -> int:
    """Smallest window whose perplexity on a batch is within eps of that without one.

    Keys at a distance of the window or more are masked at test time; found by bisection, which
    takes the difference to fall as the window grows.
    """
    spec = _windowed(models.spec(cfg))
    length = batch.tokens_BL.shape[1]

    def perplexity(window: int) -> float:
        return float(jnp.exp(_loss(spec, params, batch, jnp.asarray(window, jnp.int32))))

    whole = perplexity(length)
    low, high = 0, length  # no window of low keys is enough, one of high is
    while high - low > 1:
        middle = (low + high) // 2
        enough = abs(perplexity(middle) - whole) < eps
        low, high = (low, middle) if enough else (middle, high)
    return high


@jax.jit(static_argnums=0)
def _loss(spec: ModelSpec, params: Any, batch: Batch, window: Array) -> Array:
    shared, layers = dict(params.get("positions", {})), {}
    for i in range(len(spec.layers)):
        kind = params["layers"][str(i)]
        mixer = kind["mixer"]
        own = {**mixer.get("positions", {}), "first": {"window": jnp.full(spec.count(i), window)}}
        layers[str(i)] = {**kind, "mixer": {**mixer, "positions": own}}
    params = {**params, "positions": shared, "layers": layers}
    logits, _ = decoder.apply(spec, params, batch.tokens_BL, batch.context, None)
    loss_BL, _ = cross_entropy(logits, batch.targets_BL)
    return (loss_BL * batch.loss_weight_BL).sum() / batch.loss_weight_BL.sum()


def _windowed(spec: ModelSpec) -> ModelSpec:
    """The model with a window that is a parameter of each layer."""

    def within(encoding: PositionEncoding) -> PositionEncoding:
        return Chain(_Within(), encoding)

    layers = tuple(dataclasses.replace(x, positions=within(x.positions)) for x in spec.layers)
    return dataclasses.replace(spec, layers=layers, positions=within(spec.positions))


@dataclasses.dataclass(frozen=True)
class _Within(PositionEncoding):
    def init_layer(self, key: jax.Array, dims: Dims) -> Params:
        return {"window": jnp.zeros((), jnp.int32)}

    def adapt(self, params: Params, part: Part, q_context: Context, k_context: Context) -> Part:
        mod = attention.compose(part.score_mod, attention.Within(params["window"]))
        return dataclasses.replace(part, score_mod=mod)
