"""Losses gathered by position within a window, per document."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def linear_edges(length: int, most: int) -> np.ndarray:
    """Edges of bins of equal width (but for the last one), at most `most` of them."""
    width = -(-length // most)
    return np.append(np.arange(0, length, width), length)


def octave_edges(length: int) -> np.ndarray:
    """Edges 0, 1, 2, 4, 8, ..., length: the bins [2^k, 2^(k+1)) and position 0."""
    powers = 2 ** np.arange(max(0, length - 1).bit_length())
    return np.concatenate([[0], powers, [length]])


def geometric_edges(length: int, growth: float, through: Sequence[int] = ()) -> np.ndarray:
    """Edges that grow by a factor, each bin a position wide at least, passing `through` some."""
    edges = [0, 1]
    while edges[-1] < length:
        edges.append(max(edges[-1] + 1, round(edges[-1] * growth)))
    stops = [stop for stop in {*through, length} if 0 < stop <= length]
    return np.array(sorted({edge for edge in edges if edge < length} | set(stops)))


def bin_sums(
    losses: Sequence[np.ndarray], positions: Sequence[np.ndarray], edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of losses and counts of tokens per document and bin, `[D, J]` both.

    Bin j holds positions edges[j] to edges[j + 1] - 1. Losses that are nan were not scored.
    """
    sums_DJ = np.zeros((len(losses), len(edges) - 1))
    counts_DJ = np.zeros_like(sums_DJ)
    for row, (loss_N, position_N) in enumerate(zip(losses, positions, strict=True)):
        scored_N = ~np.isnan(loss_N)
        bin_N = np.searchsorted(edges, position_N[scored_N], side="right") - 1
        inside_N = (bin_N >= 0) & (bin_N < len(edges) - 1)
        bins = bin_N[inside_N]
        counts_DJ[row] = np.bincount(bins, minlength=len(edges) - 1)
        sums_DJ[row] = np.bincount(bins, loss_N[scored_N][inside_N], minlength=len(edges) - 1)
    return sums_DJ, counts_DJ


def labels(edges: Sequence[int]) -> list[str]:
    """Positions of each bin in words: `7`, or `128-255`."""
    return [f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in pairwise(edges)]
