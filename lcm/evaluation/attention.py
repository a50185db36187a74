"""Statistics of attention weights, and the temperature that keeps them as a document grows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm import models, positions
from lcm.errors import ConfigError
from lcm.ops.attention import Part
from lcm.ops.attention.reference import scores
from lcm.positions import Aligned, Chain
from lcm.types import Array, Context, Tokens

COLDEST = 0.02  # of temperatures that are tried
HALVINGS = 12  # of the interval between it and 1


def weights(parts: tuple[Part, ...], context: Context) -> Array:
    """Dense attention weights over the union of parts that show no key twice, `[B, H, L, S]`."""
    length, _, size = parts[0].q_BLHK.shape[1:]
    slots = jnp.arange(length)
    found = [
        jnp.where(
            p.sees(context, context, slots), scores(p, context, context, size**-0.5), -jnp.inf
        )
        for p in parts
    ]
    union = functools.reduce(jnp.maximum, found)
    some = jnp.isfinite(union).any(-1, keepdims=True)
    return jnp.where(some, jax.nn.softmax(jnp.where(some, union, 0.0)), 0.0)


def entropy(parts: tuple[Part, ...], context: Context) -> Array:
    """`-sum_j p_ij ln p_ij` in nats, `[B, H, L]`: at most ln(i + 1) for query i."""
    p = weights(parts, context)
    return -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum(-1)


def largest(parts: tuple[Part, ...], context: Context) -> Array:
    """`max_j p_ij`, `[B, H, L]`."""
    return weights(parts, context).max(-1)


STATISTICS: dict[str, Callable[[tuple[Part, ...], Context], Array]] = {
    "entropy": entropy,
    "largest": largest,
}


def statistic_by_position(cfg: Any, params: Any, tokens_BL: Tokens, name: str) -> np.ndarray:
    """A statistic of `STATISTICS` by layer and position, mean over heads and rows, `[layers, L]`.

    The place where the entropy bends is where perplexity begins to rise (arXiv:2404.12224).
    """
    return np.asarray(models.probe(cfg, params, tokens_BL, _BY_POSITION[_known(name)]))


def align_temperature(
    cfg: Any, params: Any, short_BL: Tokens, long_BL: Tokens, statistic: str = "entropy"
) -> float:
    """T for `aligned`: a statistic of attention on long rows becomes what it is on trained ones.

    Attention alignment (Chi et al., Findings of NAACL 2024, arXiv:2311.00684): the mean, over rows,
    layers, heads and queries, of the entropy or the largest probability; one T for the model, by
    bisection, since both are monotone in T. 1 where long rows have the statistic already.

    Args:
        cfg: the trained model's, without `aligned`.
        params: of it.
        short_BL: rows of the trained length.
        long_BL: rows of the length to be read.
        statistic: "entropy" or "largest".

    Raises:
        ConfigError: for an unknown statistic.
    """
    measure = _MEANS[_known(statistic)]
    aligned = cfg.copy_and_resolve_references()
    entry = positions.config(Chain(Aligned(), positions.make(cfg.model.positions)))
    with aligned.unlocked(), aligned.model.ignore_type():
        aligned.model.positions = type(cfg)(entry)
    adopted = models.adopt(aligned, params, jax.random.key(0))

    def at(temperature: float, tokens_BL: Tokens) -> float:
        own = adopted["positions"]["model"]
        first = {"temperature": jnp.asarray(temperature, jnp.float32)}
        shared = {**adopted["positions"], "model": {**own, "first": first}}
        found = models.probe(aligned, {**adopted, "positions": shared}, tokens_BL, measure)
        return float(np.mean(found))

    wanted, flatter = at(1.0, short_BL), {"entropy": 1, "largest": -1}[statistic]
    if flatter * (at(1.0, long_BL) - wanted) <= 0:
        return 1.0
    cold, warm = COLDEST, 1.0
    for _ in range(HALVINGS):
        middle = (cold + warm) / 2
        if flatter * (at(middle, long_BL) - wanted) > 0:
            warm = middle
        else:
            cold = middle
    return (cold + warm) / 2


def gaussian_temperature(deviation: float, s: float) -> float:
    """T of entropy alignment for scores drawn from a normal distribution, at s times the length.

    sigma / sqrt(sigma^2 + 2 ln s): from H = ln L - sigma^2 / 2 T^2, so for sigma / T well below
    sqrt(2 ln L).
    """
    return deviation / (deviation**2 + 2 * np.log(s)) ** 0.5


def _known(name: str) -> str:
    if name not in STATISTICS:
        raise ConfigError(f"statistic {name!r} is unknown: choose from {', '.join(STATISTICS)}")
    return name


# Made once, so that a probe with one of them is compiled once.
def _mean(parts: tuple[Part, ...], context: Context, of: Callable, axes: Any) -> Array:
    return of(parts, context).mean(axes)


_MEANS = {name: functools.partial(_mean, of=of, axes=None) for name, of in STATISTICS.items()}
_BY_POSITION = {
    name: functools.partial(_mean, of=of, axes=(0, 1)) for name, of in STATISTICS.items()
}
