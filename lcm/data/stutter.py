"""Copying what stutters: each symbol is said one to three times, and is to be given once.

Symbols differ from the one before, or an answer could not be told. The pairs are what a transducer
is tested with: the length of the answer is in the content of the input, not in its length.
"""

from typing import NamedTuple

import numpy as np

from lcm.errors import ConfigError

MOST = 3  # times that a symbol is said


class StutterPairs(NamedTuple):
    """int32 inputs `[B, T]` and answers `[B, U]` of symbols from 1 on, and how many are there."""

    frames_BT: np.ndarray
    frames_B: np.ndarray
    labels_BU: np.ndarray
    labels_B: np.ndarray


def pairs(
    symbols: int, lengths: tuple[int, int], rows: int, seed: int | tuple[int, ...], room: int = 0
) -> StutterPairs:
    """`rows` pairs of answers of `lengths` symbols, from the first to the last.

    room: symbols that answers are padded to, where lengths apart are to have one shape.

    Raises:
        ConfigError: for less than two symbols, or lengths that are no range from 1 up.
    """
    low, high = lengths
    if symbols < 2:
        raise ConfigError(f"symbols={symbols}: neighbours differ, so give 2 or more")
    if not 1 <= low <= high:
        raise ConfigError(f"lengths {low}-{high} are no range from 1 up: give (LOW, HIGH)")
    rng = np.random.default_rng(seed)
    frames_BT = np.zeros((rows, MOST * max(room, high)), np.int32)
    labels_BU = np.zeros((rows, max(room, high)), np.int32)
    frames_B, labels_B = np.zeros((2, rows), np.int32)
    for row in range(rows):
        count = rng.integers(low, high + 1)
        # Each is another step around the circle of symbols than none.
        steps = np.append(rng.integers(0, symbols), rng.integers(1, symbols, count - 1))
        answer = steps.cumsum() % symbols + 1
        said = np.repeat(answer, rng.integers(1, MOST + 1, count))
        frames_BT[row, : len(said)], labels_BU[row, :count] = said, answer
        frames_B[row], labels_B[row] = len(said), count
    return StutterPairs(frames_BT, frames_B, labels_BU, labels_B)


def sequences(pairs: StutterPairs) -> list[list[int]]:
    """The answers without their padding."""
    rows = zip(pairs.labels_BU, pairs.labels_B, strict=True)
    return [labels[:count].tolist() for labels, count in rows]
