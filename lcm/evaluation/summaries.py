"""From the loss of each token to the sections of an evaluation's result, all ready for JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lcm.evaluation import bins, curves, statistics
from lcm.evaluation.documents import Document
from lcm.evaluation.statistics import Interval
from lcm.evaluation.windows import window_positions

MOST_BINS = 512  # of the exact curve by position; one per position up to this length
CURVE_GROWTH = 1.15  # of the bins of the smooth curve, which has intervals

Losses = Sequence[np.ndarray]  # of each token of each document, nan where not scored


class Intervals(NamedTuple):
    """How confidence intervals are made."""

    replicates: int
    confidence: float
    seed: int

    def draw(self, sums_DK: np.ndarray, counts_DK: np.ndarray) -> np.ndarray:
        """Replicates of the mean losses, `[replicates, K]`, paired over the columns."""
        return statistics.resampled_ratios(
            sums_DK, counts_DK, replicates=self.replicates, seed=self.seed
        )

    def of(self, value: float, replicates_R: np.ndarray, n: int) -> Interval:
        """Percentile interval of replicates from `draw`."""
        return statistics.percentile(value, replicates_R, self.confidence, n=n)

    def means(self, sums_DK: np.ndarray, counts_DK: np.ndarray) -> list[Interval]:
        """Interval of each column's mean loss."""
        replicates_RK = self.draw(sums_DK, counts_DK)
        values_K = statistics.ratio(sums_DK, counts_DK)
        used_K = np.count_nonzero(counts_DK, axis=0)
        return [self.of(v, r, n) for v, r, n in zip(values_K, replicates_RK.T, used_K, strict=True)]


def as_json(interval: Interval) -> dict[str, float | None]:
    """The interval as a dictionary; None where a number is nan or overflows."""
    return {k: (float(v) if math.isfinite(v) else None) for k, v in interval._asdict().items()}


def exponential(interval: Interval) -> Interval:
    """Perplexity from mean loss; an increasing map takes percentiles to percentiles."""
    with np.errstate(over="ignore"):
        return Interval(*(float(np.exp(limit)) for limit in interval))


def sums_and_counts(columns: Sequence[Losses]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of losses and counts of scored tokens per document, `[D, K]` both."""
    sums_DK = np.array([[np.nansum(loss_N) for loss_N in losses] for losses in columns]).T
    counts_DK = np.array([[np.sum(~np.isnan(loss_N)) for loss_N in losses] for losses in columns]).T
    return sums_DK, counts_DK


def inventory(documents: Sequence[Document]) -> dict[str, list]:
    """Which documents were scored and how much of each, so that runs can be paired."""
    return {
        "names": [document.name for document in documents],
        "tokens": [len(document.tokens_N) for document in documents],
        "bytes": [document.text_bytes for document in documents],
    }


def length_points(
    by_length: Mapping[int, Losses], train_length: int, intervals: Intervals
) -> list[dict[str, Any]]:
    """One entry per window length: mean loss, by position, and beyond the training length."""
    lengths = list(by_length)
    sums_DK, counts_DK = sums_and_counts(list(by_length.values()))
    means = intervals.means(sums_DK, counts_DK)
    return [
        {
            "length": length,
            "multiple": length / train_length,
            "tokens": int(counts_DK[:, column].sum()),
            "loss": as_json(means[column]),
            "perplexity": as_json(exponential(means[column])),
            "document_sums": sums_DK[:, column].tolist(),
            "by_position": by_position(by_length[length], length),
            "curve": curve(by_length[length], length, train_length, intervals),
            "beyond": beyond(by_length, length, train_length, intervals),
        }
        for column, length in enumerate(lengths)
    ]


def _positions(losses: Losses, length: int) -> list[np.ndarray]:
    return [window_positions(len(loss_N), length, length) for loss_N in losses]


def by_position(losses: Losses, length: int) -> dict[str, list]:
    """Mean loss at each position of a window, in at most MOST_BINS bins of equal width."""
    edges = bins.linear_edges(length, MOST_BINS)
    sums_DJ, counts_DJ = bins.bin_sums(losses, _positions(losses, length), edges)
    return {
        "edges": edges.tolist(),
        "mean": statistics.ratio(sums_DJ, counts_DJ).tolist(),
        "count": counts_DJ.sum(axis=0).astype(int).tolist(),
    }


def curve(losses: Losses, length: int, train_length: int, intervals: Intervals) -> dict[str, list]:
    """Mean loss with intervals in bins that grow with position; one edge is the training length."""
    edges = bins.geometric_edges(length, CURVE_GROWTH, through=[train_length])
    sums_DJ, counts_DJ = bins.bin_sums(losses, _positions(losses, length), edges)
    points = [as_json(point) for point in intervals.means(sums_DJ, counts_DJ)]
    return {
        "edges": edges.tolist(),
        **{key: [point[key] for point in points] for key in Interval._fields},
        "count": counts_DJ.sum(axis=0).astype(int).tolist(),
    }


def beyond(
    by_length: Mapping[int, Losses], length: int, train_length: int, intervals: Intervals
) -> dict[str, Any] | None:
    """Loss at the positions no training window had, and what the same tokens cost within them.

    `excess` is the paired difference between the two: what going beyond the training length costs
    (or, below 0, gains from more context), free of how hard the text at those positions is.
    """
    if length <= train_length:
        return None
    late = [p >= train_length for p in _positions(by_length[length], length)]

    def masked(losses: Losses) -> Losses:
        return [np.where(late_N, n, np.nan) for n, late_N in zip(losses, late, strict=True)]

    within = by_length.get(train_length)
    columns = [masked(by_length[length])] + ([masked(within)] if within is not None else [])
    sums_DK, counts_DK = sums_and_counts(columns)
    means = intervals.means(sums_DK, counts_DK)
    result = {"loss": as_json(means[0]), "tokens": int(counts_DK[:, 0].sum())}
    if within is not None:
        replicates_RK = intervals.draw(sums_DK, counts_DK)
        excess = intervals.of(
            means[0].value - means[1].value, replicates_RK[:, 0] - replicates_RK[:, 1], len(late)
        )
        result |= {"within": as_json(means[1]), "excess": as_json(excess)}
    return result


def effective_length(
    by_length: Mapping[int, Losses], threshold: float, intervals: Intervals
) -> dict[str, Any]:
    """Prefix rule on the loss relative to that at the shortest length, paired over documents."""
    lengths = list(by_length)
    sums_DK, counts_DK = sums_and_counts(list(by_length.values()))
    values_K = statistics.ratio(sums_DK, counts_DK)
    replicates_RK = intervals.draw(sums_DK, counts_DK)
    relative = [
        intervals.of(value / values_K[0], column_R / replicates_RK[:, 0], len(sums_DK))
        for value, column_R in zip(values_K, replicates_RK.T, strict=True)
    ]
    result = curves.effective_length_of_losses(lengths, relative, threshold)
    return {
        **as_json(result),
        "threshold": threshold,
        "reference": lengths[0],
        "lengths": lengths,
        "relative_loss": [as_json(point) for point in relative],
        "longest_tested": result.value == lengths[-1],
    }


def perplexity(
    protocol: str,
    losses: Losses,
    documents: Sequence[Document],
    length: int,
    stride: int,
    intervals: Intervals,
) -> dict[str, Any]:
    """Mean loss, perplexity and bits per byte of all scored tokens under one protocol."""
    sums_DK, counts_DK = sums_and_counts([losses])
    bits_DK = sums_DK / math.log(2)
    bytes_DK = np.array([[document.text_bytes] for document in documents])
    (loss,) = intervals.means(sums_DK, counts_DK)
    (bits_per_byte,) = intervals.means(bits_DK, bytes_DK)
    return {
        "protocol": protocol,
        "length": length,
        "stride": stride,
        "tokens": int(counts_DK.sum()),
        "loss": as_json(loss),
        "perplexity": as_json(exponential(loss)),
        "bits_per_byte": as_json(bits_per_byte),
        "document_sums": sums_DK[:, 0].tolist(),
    }


def context_points(by_context: Mapping[int, Losses], intervals: Intervals) -> list[dict[str, Any]]:
    """Mean loss of the same tokens after each amount of context, shortest first."""
    sums_DK, counts_DK = sums_and_counts(list(by_context.values()))
    means = intervals.means(sums_DK, counts_DK)
    return [
        {
            "context": context,
            "tokens": int(counts_DK[:, column].sum()),
            "loss": as_json(means[column]),
            "document_sums": sums_DK[:, column].tolist(),
        }
        for column, context in enumerate(by_context)
    ]
