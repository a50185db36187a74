"""Properties of sequences that tell when a longer context helps, and metrics by quartiles of them.

Context Clues (arXiv:2412.16178): how much is said again, how irregular the gaps are, and how hard
later tokens are to foresee. Of events, text or logs alike.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lcm.evaluation.bins import bin_sums
from lcm.evaluation.statistics import Interval, bootstrap, percentile, resampled_ratios
from lcm.evaluation.windows import Plan, cut

ORDERS = (1, 2, 3, 4)


def repetition(tokens: Sequence[Any], n: int) -> float:
    """`RR_n`: the share of distinct n-grams that occur more than once; nan where there is none.

    Not one less the type/token ratio: an n-gram counts once however often it occurs.
    """
    if n < 1:
        raise ValueError(f"n={n} is no length of an n-gram: give 1 or more")
    tokens = np.asarray(tokens).tolist()
    counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    return sum(count > 1 for count in counts.values()) / len(counts) if counts else math.nan


def repetition_rate(tokens: Sequence[Any]) -> float:
    """`(RR_1 RR_2 RR_3 RR_4)^(1/4)`; nan for less than four tokens."""
    return float(np.prod([repetition(tokens, n) for n in ORDERS]) ** (1 / len(ORDERS)))


class Irregularity(NamedTuple):
    """Of the gaps between events, in their unit; nan where there are too few."""

    deviation: float  # of a sample (n - 1); what is stratified by
    mean: float
    quartile_range: float


def irregularity(times: Sequence[float]) -> Irregularity:
    """How gaps between successive events differ.

    Raises:
        ValueError: for times that go back.
    """
    gaps = np.diff(np.asarray(times, np.float64))
    if (gaps < 0).any():
        at = int((gaps < 0).argmax())
        raise ValueError(f"time {times[at + 1]} follows {times[at]}: sort the events by time")
    if not len(gaps):
        return Irregularity(math.nan, math.nan, math.nan)
    low, high = np.quantile(gaps, [0.25, 0.75])
    deviation = gaps.std(ddof=1) if len(gaps) > 1 else math.nan
    return Irregularity(float(deviation), float(gaps.mean()), float(high - low))


def quartiles(values: Sequence[float], parts: int = 4) -> np.ndarray:
    """The quartile of each value, from 0: ranks, ties at the least of theirs, in equal bins, `[D]`.

    Values that tie are never parted, so quartiles may differ in size, and some be empty.

    Raises:
        ValueError: for values that are nan, or less than `parts` of them.
    """
    values_D = np.asarray(values, np.float64)
    if len(values_D) < parts or np.isnan(values_D).any():
        raise ValueError(
            f"{len(values_D)} values, {int(np.isnan(values_D).sum())} of them nan, make no {parts} "
            "parts: give one each and more, and leave out what has none"
        )
    below_D = np.searchsorted(np.sort(values_D), values_D, side="left")
    return below_D * parts // len(values_D)


def by_quartile(
    values: Sequence[float],
    numerator: Sequence[float],
    denominator: Sequence[float] | float = 1.0,
    *,
    parts: int = 4,
    replicates: int = 1000,
    seed: int = 0,
) -> list[Interval | None]:
    """A metric in each quartile of a property: ratios of totals, 95 % bootstraps over sequences.

    numerator and denominator: of each sequence, such as summed losses and tokens, or Brier scores.
    None stands for a quartile without a sequence.
    """
    part_D = quartiles(values, parts)
    above_D, below_D = np.broadcast_arrays(np.asarray(numerator, float), denominator)
    if above_D.shape != part_D.shape:
        raise ValueError(f"{len(part_D)} values for metrics {above_D.shape}: give one each")
    chosen = [part_D == part for part in range(parts)]
    return [
        bootstrap(above_D[own], below_D[own], replicates=replicates, seed=seed)
        if own.any()
        else None
        for own in chosen
    ]


def sliding(sizes: Sequence[int], context: int, stride: int = 32) -> Plan:
    """The paper's windows, for `token_losses`: each token once, with what the context allows.

    Every window that is not the first of its sequence has `context` tokens: the last is shifted
    back, so that its tokens have more before them than by `cut`, whose last window is shorter.
    """
    plan = cut(sizes, context, stride)
    end_W = plan.end_W
    return plan._replace(start_W=np.maximum(0, end_W - context))


class PositionPerplexity(NamedTuple):
    """Perplexity of the tokens at places `edges[j]` to `edges[j + 1] - 1` of their sequences."""

    edges: np.ndarray
    bins: list[Interval]


def perplexity_by_position(
    losses: Sequence[np.ndarray], edges: Sequence[int], *, replicates: int = 1000, seed: int = 0
) -> PositionPerplexity:
    """exp of the mean loss by place in the whole sequence, with bootstraps over sequences.

    losses: nats of each token of each sequence, nan where it was not scored.
    """
    edges_J = np.asarray(edges)
    places = [np.arange(len(loss_N)) for loss_N in losses]
    sums_DJ, counts_DJ = bin_sums(losses, places, edges_J)
    drawn_RJ = np.exp(resampled_ratios(sums_DJ, counts_DJ, replicates=replicates, seed=seed))
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_J = sums_DJ.sum(0) / counts_DJ.sum(0)
    bins = [
        percentile(float(np.exp(mean_J[j])), drawn_RJ[:, j], n=len(losses))
        for j in range(len(edges_J) - 1)
    ]
    return PositionPerplexity(edges_J, bins)
