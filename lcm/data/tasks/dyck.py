"""Brackets: close what is open.

    dyck      ( [ ] |           )          the closing brackets that are missing, innermost first
    shuffle   ( [ ) |           ]          as many of each kind as are missing, kinds in their order

Prefixes are drawn step by step and kept within a depth; a prefix of a Dyck word has one shortest
completion, that of a shuffle of Dyck words is fixed by the order of the kinds.
"""

import dataclasses
import random
from collections import Counter

from lcm.data.tasks.task import Example, Lengths, Task

PAIRS = ("()", "[]", "{}", "<>")


@dataclasses.dataclass(frozen=True)
class Dyck(Task):
    """The shortest completion of a prefix with open brackets; length is that of the prefix."""

    train: Lengths = (2, 40)
    test: Lengths = (41, 100)
    depth: int = 8
    shuffle: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        return ("|", *(bracket for pair in PAIRS for bracket in pair))

    def sample(self, rng: random.Random, cell: int) -> Example:
        while True:
            text, left = self._prefix(rng, cell)
            if left:
                if self.shuffle:
                    left.sort(key=PAIRS.index)
                closing = " ".join(pair[1] for pair in left)
                return Example(" ".join([*text, "| "]), closing, cell)

    def _prefix(self, rng: random.Random, cell: int) -> tuple[list[str], list[str]]:
        """A random prefix, and the pairs open at its end, innermost first."""
        text, left = [], []
        for _ in range(cell):
            if not left or (len(left) < self.depth and rng.random() < 0.5):
                left.insert(0, rng.choice(PAIRS))
                text.append(left[0][0])
            else:
                pair = left.pop(rng.randrange(len(left)) if self.shuffle else 0)
                text.append(pair[1])
        return text, left

    def solve(self, prompt: str) -> str:
        text = "".join(self.vocabulary.split(prompt)[:-1])
        if self.shuffle:
            seen = Counter(text)
            return " ".join("".join(b * (seen[a] - seen[b]) for a, b in PAIRS))
        while any(pair in text for pair in PAIRS):  # by rewriting, not by a stack
            for pair in PAIRS:
                text = text.replace(pair, "")
        closing = {a: b for a, b in PAIRS}
        return " ".join(closing[bracket] for bracket in reversed(text))
