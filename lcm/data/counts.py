"""Counts of a rate that decays, in intervals of irregular length, made up: all of it is known.

A stream is seen at times alone, t_0 = 0, t_1, ...: how much there was between two of them, and
whether a burst begins (interval-censored counts, as of posts and their engagement in IC-Mamba,
arXiv:2502.04655). As the process is known, so is the best that can be foreseen.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy import special

from lcm.errors import ConfigError
from lcm.types import Array, Batch, Context


class Counts(NamedTuple):
    """Streams of L intervals, which end at times 1 to L; B of them, K kinds there are.

    times: float64 `[B, L + 1]`, from 0.
    begins: bool `[B, L + 1]`, whether a burst begins at this time; at the first one does.
    counts: int32 `[B, L]`, of each interval, at most `most`.
    kind: int32 `[B]`, which is hidden.
    """

    times: np.ndarray
    begins: np.ndarray
    counts_BL: np.ndarray
    kind_B: np.ndarray


@dataclasses.dataclass(frozen=True)
class DecayingCounts:
    """A Poisson process of rate `floor + peak exp(-(t - s) / life)`, s being when a burst began.

    A stream has one of `lives` and one of `peaks`, drawn evenly, for all of its bursts: what was
    read long ago tells how the next ends. A burst begins at each time by the probability `renewal`,
    and ends the one before. Intervals are log-normal of mean 1; the standard deviation of their
    logarithm is even between 0 and `irregularity`, by stream. Counts above `most` are told as it.

    Raises:
        ConfigError: naming the setting, its value and its limit.
    """

    lives: tuple[float, ...] = (1.0, 4.0, 16.0)
    peaks: tuple[float, ...] = (2.0, 6.0)
    floor: float = 0.25
    renewal: float = 0.1
    irregularity: float = 1.5
    most: int = 20

    def __post_init__(self) -> None:
        if min(self.lives, default=0) <= 0 or min(self.peaks, default=-1) < 0:
            raise ConfigError(
                f"lives={self.lives}, peaks={self.peaks} of DecayingCounts: give one each or more, "
                "lives above 0, peaks from 0 up"
            )
        limits = {
            "floor": (1e-6, 1e6),
            "renewal": (0, 1),
            "irregularity": (0, 20),
            "most": (1, 2**15),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(
                    f"{name}={value} of DecayingCounts must lie between {low} and {high}"
                )

    @property
    def vocab(self) -> int:
        """Number of tokens there are: counts, and counts behind which a burst begins."""
        return 2 * (self.most + 1)

    @property
    def kinds(self) -> tuple[tuple[float, float], ...]:
        """The life and the peak of each kind of stream."""
        return tuple((life, peak) for life in self.lives for peak in self.peaks)

    def streams(self, seed: tuple[int, ...], count: int, length: int) -> Counts:
        """`count` streams of `length` intervals, decided by `seed`."""
        rng = np.random.default_rng(seed)
        kind_B = rng.integers(len(self.kinds), size=count, dtype=np.int32)
        spread_B1 = rng.uniform(0, self.irregularity, (count, 1))
        # Of mean 1 whatever the spread.
        tau_BL = np.exp(spread_B1 * rng.standard_normal((count, length)) - spread_B1**2 / 2)
        times = np.concatenate([np.zeros((count, 1)), tau_BL.cumsum(1)], axis=1)
        begins = rng.random(times.shape) < self.renewal
        begins[:, 0] = True
        mean_BLK = self.expected(times, begins)
        mean_BL = np.take_along_axis(mean_BLK, kind_B[:, None, None], axis=2)[..., 0]
        counts_BL = np.minimum(rng.poisson(mean_BL), self.most).astype(np.int32)
        return Counts(times, begins, counts_BL, kind_B)

    def expected(self, times: Array, begins: Array) -> np.ndarray:
        """The integral of the rate over each interval, were the stream of each kind, `[B, L, K]`.

        floor (b - a) + peak life (exp(-(a - s) / life) - exp(-(b - s) / life))
        """
        tau_BL1, since_BL1 = np.diff(times)[..., None], _since(times, begins)[..., None]
        return self._integrals(since_BL1, tau_BL1, np.array(self.kinds))

    def _integrals(self, since: np.ndarray, tau: np.ndarray, kinds_K2: np.ndarray) -> np.ndarray:
        life_K, peak_K = kinds_K2[..., 0], kinds_K2[..., 1]
        falls = np.exp(-since / life_K) * -np.expm1(-tau / life_K)
        return self.floor * tau + peak_K * life_K * falls

    def tokens(self, streams: Counts) -> np.ndarray:
        """What is read at times 0 to L - 1, int32 `[B, L]`: the count of the interval that ends
        there, none at the first, and `most + 1` more where a burst begins."""
        before_BL = np.concatenate([0 * streams.kind_B[:, None], streams.counts_BL[:, :-1]], axis=1)
        return before_BL + (self.most + 1) * streams.begins[:, :-1].astype(np.int32)

    def batch(self, streams: Counts) -> Batch:
        """Rows that ask at each place for the count of the interval to come; of times they tell
        nothing."""
        tokens_BL = self.tokens(streams)
        places_L, ones_BL = np.arange(tokens_BL.shape[1], dtype=np.int32), np.ones_like(tokens_BL)
        context = Context(np.broadcast_to(places_L, tokens_BL.shape), ones_BL, -ones_BL)
        return Batch(tokens_BL, streams.counts_BL, context, ones_BL.astype(np.float32))

    def told(self, streams: Counts) -> np.ndarray:
        """Nats of each count for one who knows the kind of the stream, `[B, L]`."""
        nats_BLK = self._nats(streams)
        return np.take_along_axis(nats_BLK, streams.kind_B[:, None, None], axis=2)[..., 0]

    def foreseen(self, streams: Counts) -> np.ndarray:
        """Nats of each count for one who knows the process, times and earlier counts, `[B, L]`.

        By Bayes' rule, kinds being even at first; none that knows no more does better on average.
        """
        nats_BLK = self._nats(streams)
        return -_log_sum(self._posterior(nats_BLK) - nats_BLK)

    def foreseen_early(self, streams: Counts, points: int = 12) -> np.ndarray:
        """`foreseen`, by one who is not told when the interval ends, `[B, L]`.

        It may have any length, by the spread that those before it show. Both are summed over at so
        many points: midpoints of the spread, and those of Gauss and Hermite.
        """
        spread_S = self.irregularity * (np.arange(points) + 0.5) / points
        spread_S = np.maximum(spread_S, 1e-3)  # of a clock's density
        log_tau_BL1 = np.log(np.diff(streams.times))[..., None]
        score_BLS = (log_tau_BL1 + spread_S**2 / 2) / spread_S
        spreads_BLS = self._posterior(score_BLS**2 / 2 + np.log(spread_S))
        node_Q, weight_Q = special.roots_hermitenorm(points)
        tau_SQ = np.exp(spread_S[:, None] * node_Q - spread_S[:, None] ** 2 / 2)
        weight_BLSQ = spreads_BLS[..., None] + np.log(weight_Q / weight_Q.sum())
        since_BL11 = _since(streams.times, streams.begins)[..., None, None]
        kinds_BLK, found = self._posterior(self._nats(streams)), []
        for n, kind in enumerate(self.kinds):
            mean_BLSQ = self._integrals(since_BL11, tau_SQ, np.array(kind))
            nats_BLSQ = poisson_nats(mean_BLSQ, streams.counts_BL, self.most)
            found.append(kinds_BLK[..., n] + special.logsumexp(weight_BLSQ - nats_BLSQ, (-2, -1)))
        return -_log_sum(np.stack(found, -1))

    @staticmethod
    def _posterior(nats_BLK: np.ndarray) -> np.ndarray:
        """Log-probabilities of what was even at first, before each of the observations."""
        before_BLK = nats_BLK - np.cumsum(nats_BLK, axis=1)
        return before_BLK - _log_sum(before_BLK)[..., None]

    def at_a_rate(self, streams: Counts, rate: float) -> np.ndarray:
        """Nats of each count were the rate constant and the same in all streams, `[B, L]`."""
        mean_BL1 = rate * np.diff(streams.times)[..., None]
        return poisson_nats(mean_BL1, streams.counts_BL, self.most)[..., 0]

    def _nats(self, streams: Counts) -> np.ndarray:
        mean_BLK = self.expected(streams.times, streams.begins)
        return poisson_nats(mean_BLK, streams.counts_BL, self.most)


def poisson_nats(mean: Array, counts_BL: Array, most: int) -> np.ndarray:
    """`-log P(min(n, most) = count)` of Poisson numbers n of each mean above 0, `[B, L, ...]`."""
    counts = np.expand_dims(counts_BL, tuple(range(2, mean.ndim)))
    nats = mean + special.gammaln(counts + 1.0) - counts * np.log(mean)
    full = np.broadcast_to(counts == most, mean.shape)
    # P(n >= most), which is nothing in float64 for the smallest means.
    share = special.gammainc(most, mean[full])
    nats[full] = -np.log(np.maximum(share, np.finfo(np.float64).tiny))
    return nats


def _since(times: Array, begins: Array) -> np.ndarray:
    """How long a burst lasts already where each interval begins, `[B, L]`."""
    began = np.maximum.accumulate(np.where(begins, times, -np.inf), axis=1)
    return (times - began)[:, :-1]


def _log_sum(x: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(x, axis=-1)
