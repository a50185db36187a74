"""Confidence intervals and paired tests for scores and losses.

Documents (or instances) are what was sampled, tokens are not: the tokens of one document share its
difficulty. Every bootstrap here therefore resamples whole documents, each given as the sum of its
losses and the number of its tokens, and the statistic is the ratio of the two totals.
"""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

REPLICATES = 10_000
CONFIDENCE = 0.95
_CHUNK = 4_000_000  # entries of the weight matrix held at once: 32 MB


class Interval(NamedTuple):
    """A value between its confidence limits; the limits are nan where n is too small for any."""

    value: float
    low: float
    high: float


def wilson(successes: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """Score interval of a proportion (Wilson, 1927)."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials is not a proportion")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / trials
    scale = 1 + z**2 / trials
    centre = (p + z**2 / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def ratio(numerator_DK: np.ndarray, denominator_DK: np.ndarray) -> np.ndarray:
    """Ratio of the totals over documents, `[K]`; nan where the denominators are all 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sum(numerator_DK, axis=0) / np.sum(denominator_DK, axis=0)


def resampled_ratios(
    numerator_DK: np.ndarray,
    denominator_DK: np.ndarray,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> np.ndarray:
    """Ratios of totals over documents drawn with replacement, `[replicates, K]`.

    The K columns see the same draw in each replicate, so the difference or the quotient of two
    columns is a paired statistic: `percentile(a - b, r_RK[:, 0] - r_RK[:, 1])`.
    """
    numerator_DK, denominator_DK = np.broadcast_arrays(numerator_DK, denominator_DK)
    draws = _resampling_weights(len(numerator_DK), replicates, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.concatenate([(w_RD @ numerator_DK) / (w_RD @ denominator_DK) for w_RD in draws])


def _resampling_weights(documents: int, replicates: int, seed: int) -> Iterator[np.ndarray]:
    """How often each document is drawn in each replicate, `[rows, D]`, in bounded chunks."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // documents)
    for start in range(0, replicates, rows):
        size = min(rows, replicates - start)
        drawn = rng.integers(0, documents, (size, documents)) + documents * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * documents)
        yield counts.reshape(size, documents).astype(np.float64)


def percentile(
    value: float, replicates_R: np.ndarray, confidence: float = CONFIDENCE, *, n: int
) -> Interval:
    """Percentile interval of replicates around the value seen on all `n` documents.

    Limits are nan for n < 2: one document says nothing about the spread between documents.
    Replicates without a value (no drawn document counts) are left out.
    """
    replicates_R = replicates_R[~np.isnan(replicates_R)]
    if n < 2 or not len(replicates_R):
        return Interval(float(value), math.nan, math.nan)
    tail = (1 - confidence) / 2
    low, high = np.quantile(replicates_R, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def bootstrap(
    numerator_D: np.ndarray,
    denominator_D: np.ndarray | float = 1.0,
    *,
    replicates: int = REPLICATES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over documents of a ratio of totals; of a mean if no denominator."""
    numerator_D, denominator_D = np.broadcast_arrays(numerator_D, denominator_D)
    replicates_R = resampled_ratios(
        numerator_D[:, None], denominator_D[:, None], replicates=replicates, seed=seed
    )[:, 0]
    value = ratio(numerator_D, denominator_D)
    return percentile(value, replicates_R, confidence, n=len(numerator_D))


def paired_bootstrap(
    numerator_a_D: np.ndarray,
    numerator_b_D: np.ndarray,
    denominator_D: np.ndarray | float = 1.0,
    *,
    replicates: int = REPLICATES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Interval of a - b, two models scored on the same tokens of the same documents."""
    return bootstrap(
        np.asarray(numerator_a_D) - np.asarray(numerator_b_D),
        denominator_D,
        replicates=replicates,
        confidence=confidence,
        seed=seed,
    )


def hierarchical_bootstrap(
    scores: Sequence[np.ndarray],
    *,
    replicates: int = REPLICATES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Interval of the mean over seeds of the mean over instances; one array of scores per seed.

    Seeds are drawn with replacement, then instances within each drawn seed.
    With a single seed this is the plain bootstrap over its instances.
    """
    rng = np.random.default_rng(seed)
    sizes_S = np.array([len(seed_scores) for seed_scores in scores])
    if not len(sizes_S) or not sizes_S.all():
        raise ValueError("every seed needs at least one score")
    flat, starts_S = np.concatenate(scores), np.cumsum(sizes_S) - sizes_S
    means_R = np.zeros(replicates)
    for _ in scores:  # one slot of the resampled list of seeds at a time, over all replicates
        seed_R = rng.integers(0, len(sizes_S), replicates)
        for chosen, size in enumerate(sizes_S):
            (rows,) = np.nonzero(seed_R == chosen)
            for chunk in np.array_split(rows, 1 + len(rows) * size // _CHUNK):
                drawn = starts_S[chosen] + rng.integers(0, size, (len(chunk), size))
                means_R[chunk] += flat[drawn].mean(axis=1) / len(sizes_S)
    value = float(np.mean([np.mean(seed_scores) for seed_scores in scores]))
    return percentile(value, means_R, confidence, n=len(flat))


def mcnemar(only_a: int, only_b: int) -> tuple[float, float]:
    """McNemar's chi-squared with continuity correction and its p-value, from discordant counts.

    `only_a` instances were solved by model a alone, `only_b` by b alone. For fewer than about 25
    of them use `mcnemar_exact`.
    """
    discordant = only_a + only_b
    if discordant == 0:
        return 0.0, 1.0
    statistic = max(abs(only_a - only_b) - 1, 0) ** 2 / discordant
    return statistic, math.erfc(math.sqrt(statistic / 2))  # survival of chi-squared, 1 degree


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided binomial p-value of discordant counts under the hypothesis of equal models."""
    discordant = only_a + only_b
    tail = sum(math.comb(discordant, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**discordant)
