"""How far sequences are from those that were wanted, in edits."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The fewest insertions, deletions and replacements from one to the other (Levenshtein)."""
    row = np.arange(len(b) + 1)
    for i, symbol in enumerate(a, 1):
        differs = np.array([symbol != other for other in b], int)
        cost = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + differs)])
        # Insertions: the least of what is before, plus the distance to it.
        index = np.arange(len(cost))
        row = np.minimum.accumulate(cost - index) + index
    return int(row[-1])


def error_rate(got: Sequence[Sequence[Any]], wanted: Sequence[Sequence[Any]]) -> float:
    """Edits of all pairs over symbols wanted: the label (phone, word) error rate.

    Raises:
        ValueError: for another number of answers than were wanted, or none wanted.
    """
    total = sum(map(len, wanted))
    if len(got) != len(wanted) or not total:
        raise ValueError(
            f"{len(got)} answers for {len(wanted)} of {total} symbols: give one for each, and a "
            "symbol or more"
        )
    pairs = zip(got, wanted, strict=True)
    return sum(edit_distance(list(a), list(b)) for a, b in pairs) / total
