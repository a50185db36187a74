"""One-number summaries of a curve over lengths: effective length, weighted averages, area."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lcm.evaluation.statistics import Interval


def chance_corrected(score: float, chance: float) -> float:
    """Score on the scale where chance is 0 and perfect is 1, for scores in [0, 1]."""
    if not chance < 1:
        raise ValueError(f"chance {chance} leaves no room above it: it must be below 1")
    return (score - chance) / (1 - chance)


def prefix_length(lengths: Sequence[int], passed: Sequence[bool]) -> int:
    """Largest length of the grid that passes together with every shorter one; 0 if none does."""
    longest = 0
    for length, good in sorted(zip(lengths, passed, strict=True)):
        if not good:
            break
        longest = length
    return longest


def effective_length_of_scores(
    lengths: Sequence[int], scores: Sequence[Interval], threshold: float
) -> Interval:
    """Prefix rule on scores that should stay above the threshold (RULER, arXiv:2404.06654).

    `value` by the point estimates, `low` and `high` by the lower and upper confidence limits (nan
    where those are); never interpolated between the lengths of the grid.
    """

    def by(limit: Sequence[float]) -> float:
        known = not any(map(math.isnan, limit))
        return prefix_length(lengths, [s > threshold for s in limit]) if known else math.nan

    return Interval(
        by([s.value for s in scores]), by([s.low for s in scores]), by([s.high for s in scores])
    )


def effective_length_of_losses(
    lengths: Sequence[int], losses: Sequence[Interval], threshold: float
) -> Interval:
    """Prefix rule on losses that should stay below the threshold.

    `value` by the point estimates; `low`, the cautious one, by the *upper* limits of the losses.
    """
    negated = [Interval(-loss.value, -loss.high, -loss.low) for loss in losses]
    return effective_length_of_scores(lengths, negated, -threshold)


def relative_threshold(lengths: Sequence[int], curve: Sequence[Interval], fraction: float) -> float:
    """A fraction (or, for losses, a multiple) of the curve's own value at the shortest length."""
    return fraction * curve[int(np.argmin(lengths))].value


def weighted_average(scores: Sequence[float], weights: Sequence[float]) -> float:
    """Mean over the lengths with given weights."""
    return float(np.average(scores, weights=weights))


def average_increasing(scores: Sequence[float]) -> float:
    """wAvg(inc) of RULER: weights 1, 2, ... from the shortest to the longest length."""
    return weighted_average(scores, range(1, len(scores) + 1))


def average_decreasing(scores: Sequence[float]) -> float:
    """wAvg(dec) of RULER: weights ..., 2, 1 from the shortest to the longest length."""
    return weighted_average(scores, range(len(scores), 0, -1))


def mean_reciprocal_rank(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean over cases of 1 / rank, rank 1 the highest score; `scores[name][case]`.

    Equals share the reciprocals of the ranks they take up, as breaking ties at random would.
    """
    names = list(scores)
    table = np.array([scores[name] for name in names])  # [names, cases]
    better = (table[None, :, :] > table[:, None, :]).sum(axis=1)
    equal = (table[None, :, :] == table[:, None, :]).sum(axis=1)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, len(names) + 1))])
    shared = (harmonic[better + equal] - harmonic[better]) / equal
    return dict(zip(names, shared.mean(axis=1).tolist(), strict=True))


def area_over_log_length(lengths: Sequence[int], scores: Sequence[float]) -> float:
    """Area under score against log2 L by trapezoids, divided by its width: a mean score."""
    octaves = np.log2(lengths)
    if len(octaves) < 2 or not np.all(np.diff(octaves) > 0):
        raise ValueError(f"need two or more increasing lengths, got {list(lengths)}")
    return float(np.trapezoid(scores, octaves) / (octaves[-1] - octaves[0]))
