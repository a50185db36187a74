"""A trained run looked at from within, at the trained length and past it, as one JSON file.

Of models of attention alone that is their attention; what an encoding does not have, such as a
bias, is left out with the reason in its place. Of others it is their recurrences
(`lcm.evaluation.states`).
"""

import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lcm import models
from lcm.errors import ConfigError
from lcm.evaluation import attention, heads, parts, receptive_field, states
from lcm.evaluation.model import Model, changed, heldout, load, scorer, variant
from lcm.evaluation.parts import plain
from lcm.evaluation.results import ATTENTION, save
from lcm.models import ModelSpec
from lcm.models.probe import check_scores
from lcm.ops.attention import Part
from lcm.types import Array, Batch, Context

SCORES = 1 << 25  # of one layer that are in memory at once where there is a choice
MOST = 1 << 28  # of one row, with which nothing is begun
EPS = 0.01  # of the sum of weights, and of the perplexity
DISTANCES = 1 << 18  # summed for a theoretical field, in every layer and head


def analyse_run(
    folder: str | pathlib.Path, overrides: Sequence[str] = (), length: int = 0
) -> pathlib.Path:
    """Analyses a workdir's newest checkpoint and writes `eval/attention-step-N.json` there, or
    `eval/states-step-N.json`.

    As with `evaluate_run`, overrides are in the file's name, and a file of that name is replaced.

    Raises:
        UserError: if the run cannot be read, or cannot be analysed so.
    """
    model = changed(load(folder), overrides)
    title = f"analyse {pathlib.Path(folder).name}"
    result = analyse_model(model, length, overrides=overrides, title=title)
    name = f"{result['kind']}-step-{model.step}{variant(overrides)}.json"
    return save(result, pathlib.Path(folder) / "eval" / name)


def analyse_model(
    model: Model, length: int = 0, *, overrides: Sequence[str] = (), title: str = "analyse"
) -> dict[str, Any]:
    """What is found of a model's attention, or of its recurrences if it has such, as plain JSON.

    length: that is compared with the trained one; 0 takes four times as much. The rows of the
    trained length are those of the longer one, cut, so that both hold the same text.

    Raises:
        UserError: if a length does not fit the model or memory, or no document reaches it.
    """
    attends = all(layer.attends for layer in models.spec(model.cfg).layers)
    look = _attention if attends else states.analyse
    return look(model, parts.longer(model.cfg, model.params, length), overrides, title)


def _attention(model: Model, length: int, overrides: Sequence[str], title: str) -> dict[str, Any]:
    """Statistics, positional heads, receptive fields and aligned temperatures."""
    cfg, params, trained = model.cfg, model.params, model.cfg.data.length
    rows = _checked(models.spec(cfg), trained, length)
    long = parts.text_rows(heldout(cfg, model.tokenizer), length, rows, cfg.seed)
    short = parts.cut(long, trained)
    both = {trained: short, length: long}
    steps: dict[str, Callable[[], Any]] = {
        "statistics": lambda: [_statistics(cfg, params, n, both[n]) for n in both],
        "positional_heads": lambda: [_heads(cfg, params, n, both[n]) for n in both],
        "theoretical": lambda: _theoretical(cfg, params),
        "empirical": lambda: _empirical(cfg, params, short),
        "aligned_temperature": lambda: _temperatures(cfg, params, short, long),
    }
    found = parts.found(steps, long.tokens_BL.size, title)
    field = {name: found.pop(name) for name in ("theoretical", "empirical")}
    count = len(long.tokens_BL)
    return {
        **parts.head(ATTENTION, model, length, count, overrides),
        **found,
        "receptive_field": field,
    }


def _checked(spec: ModelSpec, trained: int, length: int) -> int:
    """How many rows of a length to look at. Raises ConfigError if it cannot be looked at."""
    check_scores(spec)
    models.check_backend(spec)
    models.check_limit(spec, length)
    scores = max(layer.heads for layer in spec.layers) * length**2
    if scores > MOST:
        most = math.isqrt(MOST * length**2 // scores)
        way = f"give --length={most} or less" if most >= trained else f"train on {most} or less"
        raise ConfigError(
            f"--length={length} has {scores:,} scores in a layer and row, {scores >> 28} GiB: "
            f"statistics need all of them at once, up to {MOST:,}: {way}"
        )
    return max(1, min(parts.ROWS, SCORES // scores))


def _statistics(cfg: Any, params: Any, length: int, batch: Batch) -> dict[str, Any]:
    """Entropy and largest probability by layer and position."""
    found = attention.statistics_by_position(cfg, params, batch.tokens_BL)
    return {"length": length, **{name: plain(value) for name, value in found.items()}}


def _heads(cfg: Any, params: Any, length: int, batch: Batch) -> dict[str, Any]:
    """Positional heads, whose far keys lie half of the length back; null for heads without any."""
    distance = length // 2
    if length <= distance + heads.SINKS:
        raise ConfigError(
            f"{length} tokens have no key {distance} back past the first {heads.SINKS}: give a "
            f"length of {2 * heads.SINKS + 1} or more"
        )
    _one_count_of_heads(models.spec(cfg))
    found = heads.positional_heads(cfg, params, batch.tokens_BL, distance)
    some = np.isfinite(found.allocation)
    score = np.where(some, found.score, np.nan)
    return {
        "length": length,
        "distance": distance,
        "score": plain(score),
        "allocation": plain(found.allocation),
        "top": [list(head) for head in found.top() if some[head]],
    }


def _theoretical(cfg: Any, params: Any) -> dict[str, Any]:
    """TRF(eps) of every layer and head, of the layer's window alone where it has one."""
    spec = models.spec(cfg)
    _one_count_of_heads(spec)
    names = " and ".join(
        sorted({type(layer.positions.attending).__name__ for layer in spec.layers})
    )
    token = jnp.zeros((1, 1), jnp.int32)
    bias_NHS = np.asarray(models.probe(cfg, params, token, _measure(names)), np.float64)
    if not bias_NHS.any():  # a temperature or a cap changes scores too, but adds nothing to them
        receptive_field.check_bias(names, ())
    fields = []
    for n, weights_HS in enumerate(np.exp(bias_NHS)):
        window = spec.layers[n % len(spec.layers)].window
        weights_HS[:, window or DISTANCES :] = 0
        fields.append(receptive_field.theoretical_receptive_field(weights_HS, EPS))
    return {"eps": EPS, "distances": DISTANCES, "by_head": plain(np.stack(fields))}


def _one_count_of_heads(spec: ModelSpec) -> None:
    counts = sorted({layer.heads for layer in spec.layers})
    if len(counts) > 1:
        raise ConfigError(
            f"layers have {' and '.join(map(str, counts))} heads, a table of heads has one count "
            "for all: look at a model whose kinds of layers have equally many"
        )


@functools.cache
def _measure(names: str) -> Callable[[tuple[Part, ...], Context], Array]:
    """A measure of biases; made once for each name, so that a probe with it is compiled once."""

    def bias(parts: tuple[Part, ...], context: Context) -> Array:
        receptive_field.check_bias(names, parts)
        return receptive_field.bias(parts, parts[0].q_BLHK.shape[2], DISTANCES)

    return bias


def _empirical(cfg: Any, params: Any, batch: Batch) -> dict[str, Any]:
    """ERF within 1 % of the perplexity on rows of the trained length."""
    perplexity = float(np.exp(np.mean(scorer(cfg, params)(batch))))
    eps = EPS * perplexity
    window = receptive_field.empirical_receptive_field(cfg, params, batch, eps)
    length = batch.tokens_BL.shape[1]
    return {"length": length, "perplexity": perplexity, "eps": eps, "tokens": int(window)}


def _temperatures(cfg: Any, params: Any, short: Batch, long: Batch) -> dict[str, float]:
    """T by each statistic for the longer rows."""
    if short.tokens_BL.shape == long.tokens_BL.shape:
        raise ConfigError("the length is the trained one, for which T is 1: give a longer --length")
    return {
        name: attention.align_temperature(cfg, params, short.tokens_BL, long.tokens_BL, name)
        for name in attention.STATISTICS
    }
