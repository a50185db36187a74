"""Counting in a string, and arithmetic modulo 5.

    count      count a : s1 ... sn |        how often a occurs, as spaced digits
    mode       s1 ... sn |                  the most frequent symbol, which no other equals
    majority   1 0 1 |                      Yes if there are more ones than zeros, else No
    modular    1 + 2 * 3 |                  the value modulo 5; * goes first

`modular` may have brackets (Deletang et al., ICLR 2023, arXiv:2207.02098).
"""

import dataclasses
import random
from collections import Counter
from typing import ClassVar

from lcm.data.tasks.arithmetic import DIGITS
from lcm.data.tasks.copying import SYMBOLS
from lcm.data.tasks.task import Example, Lengths, Task, digits


@dataclasses.dataclass(frozen=True)
class _Counting(Task):
    train: Lengths = (2, 50)
    test: Lengths = (51, 100)
    shortest: ClassVar[int] = 2


@dataclasses.dataclass(frozen=True)
class Count(_Counting):
    """How often a symbol occurs among 8."""

    @property
    def words(self) -> tuple[str, ...]:
        return ("count", ":", "|", *DIGITS, *SYMBOLS[:8])

    def sample(self, rng: random.Random, cell: int) -> Example:
        wanted, *others = rng.sample(SYMBOLS[:8], 8)
        times = rng.randint(0, cell)  # every count as often as any other
        string = [wanted] * times + rng.choices(others, k=cell - times)
        rng.shuffle(string)
        return Example(f"count {wanted} : {' '.join(string)} | ", digits(times), cell)

    def solve(self, prompt: str) -> str:
        _, wanted, _, *string, _ = self.vocabulary.split(prompt)
        return digits(sum(word == wanted for word in string))


@dataclasses.dataclass(frozen=True)
class Mode(_Counting):
    """The most frequent of 8 symbols; strings with a tie are drawn again."""

    @property
    def words(self) -> tuple[str, ...]:
        return ("|", *SYMBOLS[:8])

    def sample(self, rng: random.Random, cell: int) -> Example:
        while True:
            string = rng.choices(SYMBOLS[:8], k=cell)
            (first, most), *rest = Counter(string).most_common(2)
            if not rest or rest[0][1] < most:
                return Example(" ".join([*string, "| "]), first, cell)

    def solve(self, prompt: str) -> str:
        string = self.vocabulary.split(prompt)[:-1]
        return max(sorted(set(string)), key=string.count)


@dataclasses.dataclass(frozen=True)
class Majority(_Counting):
    """Whether bits have more ones than zeros."""

    @property
    def words(self) -> tuple[str, ...]:
        return ("|", "0", "1", "Yes", "No")

    def sample(self, rng: random.Random, cell: int) -> Example:
        ones = rng.randint(0, cell)
        bits = ["1"] * ones + ["0"] * (cell - ones)
        rng.shuffle(bits)
        return Example(" ".join([*bits, "| "]), "Yes" if 2 * ones > cell else "No", cell)

    def solve(self, prompt: str) -> str:
        balance = sum({"1": 1, "0": -1}.get(word, 0) for word in self.vocabulary.split(prompt))
        return "Yes" if balance > 0 else "No"


@dataclasses.dataclass(frozen=True)
class Modular(Task):
    """An expression over 0 ... 4 with + - *, modulo 5; length is the number of operands."""

    train: Lengths = (1, 20)
    test: Lengths = (21, 100)
    brackets: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        return ("|", "+", "-", "*", "(", ")", *DIGITS[:5])

    def sample(self, rng: random.Random, cell: int) -> Example:
        tokens = self._expression(rng, cell)
        return Example(" ".join([*tokens, "| "]), str(_sum(iter(tokens))), cell)

    def _expression(self, rng: random.Random, operands: int) -> list[str]:
        """Tokens with so many operands; where there are brackets, each sum of two halves."""
        if operands == 1:
            return [rng.choice(DIGITS[:5])]
        left = rng.randrange(1, operands)
        halves = [self._expression(rng, n) for n in (left, operands - left)]
        inside = [*halves[0], rng.choice("+-*"), *halves[1]]
        return ["(", *inside, ")"] if self.brackets else inside

    def solve(self, prompt: str) -> str:
        expression = " ".join(self.vocabulary.split(prompt)[:-1])
        return str(eval(expression, {"__builtins__": {}}) % 5)  # of the task's words alone


def _sum(tokens) -> int:
    """The value modulo 5 of tokens up to a closing bracket or the end, read once from the left."""
    total, product, sign = 0, 1, 1
    for token in tokens:
        if token in "+-":
            total, product, sign = total + sign * product, 1, 1 if token == "+" else -1
        elif token == ")":
            break
        elif token != "*":
            product *= _sum(tokens) if token == "(" else int(token)
    return (total + sign * product) % 5
