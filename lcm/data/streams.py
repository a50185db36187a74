"""Streams of keys and values, as arrays: tasks whose text has no natural length.

Where examples of `lcm.data.tasks` have a prompt and an answer, these have an answer at many places
of one row, and a row may be as long as one likes, or go on where another ended.
"""

import dataclasses

import numpy as np

from lcm.errors import ConfigError
from lcm.types import Array, Batch, Context


@dataclasses.dataclass(frozen=True)
class OverwriteRecall:
    """Keys that are given values again and again, and asked for the last one.

    Pairs of a key and a value, each with even odds one that is written, of any key and value, or
    a question: a key that has been written, as a token of its own, and its value. Tokens are keys
    0 .. K - 1, questions K .. 2 K - 1 and values 2 K .. 3 K - 1. With a `window` questions are of
    keys written within so many pairs before, so that older content does not matter.
    """

    keys: int = 32
    window: int = 0

    def __post_init__(self) -> None:
        if self.keys < 1 or self.window < 0:
            raise ConfigError(
                f"keys={self.keys}, window={self.window} of OverwriteRecall: take keys from 1 up, "
                "and a window of pairs or 0 for all of the past"
            )

    @property
    def vocab(self) -> int:
        """Number of tokens there are."""
        return 3 * self.keys

    def rows(self, seed: tuple[int, ...], count: int, length: int) -> np.ndarray:
        """`count` streams `[count, length]`, int32, decided by `seed`.

        Raises:
            ConfigError: for an odd length, which would cut a pair in two.
        """
        if length < 2 or length % 2:
            raise ConfigError(f"length {length} cuts a pair in two: take {2 * (length // 2) + 2}")
        rng, each = np.random.default_rng(seed), np.arange(count)
        value_BK = np.zeros((count, self.keys), np.int32)
        written_BK = np.full((count, self.keys), -1)
        tokens_BL = np.empty((count, length), np.int32)
        for pair in range(length // 2):
            known_BK = written_BK >= 0
            if self.window:
                known_BK &= pair - written_BK <= self.window
            asks_B = (rng.random(count) < 0.5) & known_BK.any(1)
            asked_B = np.where(known_BK, rng.random(known_BK.shape), -1).argmax(1)
            key_B = np.where(asks_B, asked_B, rng.integers(self.keys, size=count))
            new_B = rng.integers(self.keys, size=count)
            value_B = np.where(asks_B, value_BK[each, key_B], new_B)
            value_BK[each, key_B] = value_B
            written_BK[each[~asks_B], key_B[~asks_B]] = pair
            tokens_BL[:, 2 * pair] = key_B + self.keys * asks_B
            tokens_BL[:, 2 * pair + 1] = 2 * self.keys + value_B
        return tokens_BL

    def asks(self, tokens_BL: Array) -> Array:
        """Which tokens are questions, behind which the answer stands."""
        return (tokens_BL >= self.keys) & (tokens_BL < 2 * self.keys)

    def batch(self, tokens_BL: np.ndarray) -> Batch:
        """Rows, or a piece of them of whole pairs, with a loss on answers alone."""
        return _batch(tokens_BL, np.roll(tokens_BL, -1, axis=1), self.asks(tokens_BL))


@dataclasses.dataclass(frozen=True)
class Mqar:
    """Multi-query associative recall (Arora et al., 2023, arXiv:2312.04927), section 3.1.

    A row tells `pairs` keys and values; after it, each of the keys stands once more, at places
    that gaps of a power law leave between them, early ones more often, and the value is to be given
    there. It does not follow in the row: other places hold token 0. Tokens are 0, keys 1 .. K and
    values K + 1 .. 2 K.
    """

    pairs: int = 8
    keys: int = 64
    power: float = 0.01

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.keys:
            raise ConfigError(
                f"pairs={self.pairs} of Mqar must lie from 1 to keys={self.keys}: keys are told "
                "once"
            )

    @property
    def vocab(self) -> int:
        """Number of tokens there are."""
        return 2 * self.keys + 1

    def batch(self, seed: tuple[int, ...], count: int, length: int) -> Batch:
        """`count` rows, decided by `seed`.

        Raises:
            ConfigError: for a length without room for all pairs and questions.
        """
        told, room = 2 * self.pairs, length - 2 * self.pairs
        if room < self.pairs:
            raise ConfigError(
                f"length {length} has no room for {self.pairs} pairs and as many questions: take "
                f"{3 * self.pairs} or more"
            )
        rng, rows = np.random.default_rng(seed), np.arange(count)[:, None]
        order_BK = rng.random((count, self.keys)).argsort(1)[:, : self.pairs]
        value_BK = rng.random((count, self.keys)).argsort(1)[:, : self.pairs] + self.keys
        tokens_BL, targets_BL = np.zeros((2, count, length), np.int32)
        tokens_BL[:, 0:told:2], tokens_BL[:, 1:told:2] = order_BK + 1, value_BK + 1
        odds = self.power * np.arange(1, room + 1) ** (self.power - 1)
        # The places of the largest of log(odds) + Gumbel are drawn by the odds, without return.
        score_BR = np.log(odds) + rng.gumbel(size=(count, room))
        at_BK = np.argpartition(-score_BR, self.pairs - 1, axis=1)[:, : self.pairs] + told
        tokens_BL[rows, at_BK], targets_BL[rows, at_BK] = order_BK + 1, value_BK + 1
        return _batch(tokens_BL, targets_BL, targets_BL > 0)


def _batch(tokens_BL: np.ndarray, targets_BL: np.ndarray, asked_BL: Array) -> Batch:
    places_L, ones_BL = np.arange(tokens_BL.shape[1], dtype=np.int32), np.ones_like(tokens_BL)
    context = Context(np.broadcast_to(places_L, tokens_BL.shape), ones_BL, -ones_BL)
    return Batch(tokens_BL, targets_BL, context, asked_BL.astype(np.float32))
