"""Finding a passage for a query: recall by rank, and BM25 as what any other way is to beat."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np


class BM25:
    """Scores of passages by the words they share with a query (Robertson and Zaragoza, 2009).

        sum_w idf_w f_w (k1 + 1) / (f_w + k1 (1 - b + b |p| / mean |p|))
        idf_w = log(1 + (N - n_w + 1/2) / (n_w + 1/2))

    Raises:
        ValueError: for no passages, or for passages without a word.
    """

    def __init__(self, passages: Sequence[Sequence[str]], k1: float = 1.2, b: float = 0.75) -> None:
        if not any(map(len, passages)):
            raise ValueError(f"{len(passages)} passages without a word: give one with words")
        self._size = len(passages)
        lengths_N = np.array([len(words) for words in passages], float)
        scale_N = k1 * (1 - b + b * lengths_N / lengths_N.mean())
        found: dict[str, list[tuple[int, float]]] = {}
        for index, words in enumerate(passages):
            for word, count in Counter(words).items():
                found.setdefault(word, []).append((index, count))
        self._weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, pairs in found.items():
            index_M = np.array([index for index, _ in pairs])
            count_M = np.array([count for _, count in pairs], float)
            idf = math.log(1 + (self._size - len(pairs) + 0.5) / (len(pairs) + 0.5))
            self._weights[word] = (
                index_M,
                idf * count_M * (k1 + 1) / (count_M + scale_N[index_M]),
            )

    def scores(self, query: Sequence[str]) -> np.ndarray:
        """Of every passage, `[N]`; a word said twice in the query counts twice."""
        scores_N = np.zeros(self._size)
        for word in query:
            if word in self._weights:
                index_M, weight_M = self._weights[word]
                scores_N[index_M] += weight_M
        return scores_N


def ranks(scores_QN: np.ndarray, wanted_Q: np.ndarray) -> np.ndarray:
    """Rank, from 1, of the passage wanted by each query; half of those that tie stand before it.

    So passages that all score alike are found at the mean rank, not at the first.
    """
    scores_QN = np.asarray(scores_QN, float)
    own_Q1 = scores_QN[np.arange(len(scores_QN)), wanted_Q][:, None]
    before_Q = (scores_QN > own_Q1).sum(1)
    return 1 + before_Q + ((scores_QN == own_Q1).sum(1) - 1) / 2


def recall(ranks_Q: np.ndarray, k: int) -> float:
    """The share of queries whose passage is among the first k."""
    return float(np.mean(np.asarray(ranks_Q) <= k))


def reciprocal_rank(ranks_Q: np.ndarray, most: int = 10) -> float:
    """MRR@`most`: the mean of 1 / rank, 0 beyond."""
    ranks_Q = np.asarray(ranks_Q, float)
    return float(np.mean(np.where(ranks_Q <= most, 1 / ranks_Q, 0.0)))
