"""Sorting and parity of a list (Kazemnejad et al., 2023, arXiv:2305.19466).

sort    Sort the following list [ a, b ].                           The sorted list is [ a, b ].
parity  Is the number of 1's even in the sequence [ 1, 0 ] ?        The answer is No.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence

from lcm.data.tasks.arithmetic import ANSWER, DIGITS
from lcm.data.tasks.copying import SYMBOLS
from lcm.data.tasks.scratchpad import WORDS, Reasoning, Step
from lcm.data.tasks.task import Example, digits

RANKED = SYMBOLS[:50]  # in their order


@dataclasses.dataclass(frozen=True)
class Sort(Reasoning):
    """A list in ascending order: of 50 symbols of fixed rank, or of numbers from 10 to 9999.

    A scratchpad is selection sort: each step takes the least item left out of the list.
    """

    multi_digit: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        own = ("Sort", "the", "following", "list", "The", "sorted", "is", "[", "]", "min", "=")
        return (*WORDS, *own, *(DIGITS if self.multi_digit else RANKED))

    def sample(self, rng: random.Random, cell: int) -> Example:
        if self.multi_digit:
            ranks = [rng.randint(10, 9999) for _ in range(cell)]
        else:
            ranks = [rng.randrange(len(RANKED)) for _ in range(cell)]
        prompt = f"Sort the following list {self._list(ranks)}. "
        answer = f"The sorted list is {self._list(sorted(ranks))}."
        return Example(prompt, self.target(self._steps(ranks), answer), cell)

    def _write(self, rank: int) -> str:
        return digits(rank) if self.multi_digit else RANKED[rank]

    def _list(self, ranks: Sequence[int]) -> str:
        return _listed([self._write(rank) for rank in ranks])

    def _steps(self, ranks: list[int]) -> Iterator[Step]:
        left = list(ranks)
        while left:
            before, least = self._list(left), self._write(min(left))
            left.remove(min(left))
            yield Step(before, f"min = {least}", least, "", self._list(left))

    def solve(self, prompt: str) -> str:
        words = self.vocabulary.split(prompt)
        inside = " ".join(words[words.index("[") + 1 : words.index("]")])
        items = [item.strip() for item in inside.split(",")]
        key = (lambda item: int(item.replace(" ", ""))) if self.multi_digit else RANKED.index
        return f"The sorted list is {_listed(sorted(items, key=key))}."


@dataclasses.dataclass(frozen=True)
class Parity(Reasoning):
    """Whether a list of bits has an even number of ones."""

    @property
    def words(self) -> tuple[str, ...]:
        own = ("Is", "the", "number", "of", "1's", "even", "sequence", "[", "]", "?", "0", "1")
        return (*WORDS, *ANSWER, *own, "Yes", "No", "**", "=", "par")

    def sample(self, rng: random.Random, cell: int) -> Example:
        bits = [rng.randrange(2) for _ in range(cell)]
        prompt = f"Is the number of 1's even in the sequence {_listed(bits)} ? "
        answer = f"The answer is {'No' if sum(bits) % 2 else 'Yes'}."
        return Example(prompt, self.target(self._steps(bits), answer), cell)

    def _steps(self, bits: list[int]) -> Iterator[Step]:
        parity = 0
        for at, bit in enumerate(bits):
            after = bit ^ parity
            computation = f"{bit} ** par = {bit} ** {parity}"
            yield Step(str(bit), computation, str(after), f"par: {after}", _listed(bits[at + 1 :]))
            parity = after

    def solve(self, prompt: str) -> str:
        odd = False
        for word in self.vocabulary.split(prompt):
            odd ^= word == "1"
        return f"The answer is {'No' if odd else 'Yes'}."


def _listed(items: Sequence[object]) -> str:
    return f"[ {', '.join(map(str, items))} ]" if items else "[ ]"
