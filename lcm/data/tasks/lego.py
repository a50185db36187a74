"""LEGO: the value of a variable at the end of a chain of sign flips (arXiv:2305.19466).

If a = +1, b = - a. Then, what is the value of b?        The answer is -1.
"""

import dataclasses
import random
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from lcm.data.tasks.scratchpad import WORDS, Reasoning, Step
from lcm.data.tasks.task import Example
from lcm.errors import ConfigError

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


class _Clause(NamedTuple):
    """`name = sign source`; the first of a chain has no source but the number 1."""

    name: str
    sign: int
    source: str

    def __str__(self) -> str:
        between = "" if self.source == "1" else " "
        return f"{self.name} = {_sign(self.sign)}{between}{self.source}"


@dataclasses.dataclass(frozen=True)
class Lego(Reasoning):
    """Distinct letters, each plus or minus the one before; the one asked for is of the second half.

    `order` is `chain`, from the first letter to the last, or `permuted`. Length is the number of
    letters. A scratchpad resolves the chain from its first letter to the one that is asked for.
    """

    order: str = "chain"
    shortest: ClassVar[int] = 2
    train: tuple[int, int] = (2, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("chain", "permuted"):
            raise ConfigError(f"order={self.order!r} is unknown: use chain or permuted")
        if self.test[1] > len(LETTERS):
            raise ConfigError(f"test={self.test} is longer than the {len(LETTERS)} letters")

    @property
    def words(self) -> tuple[str, ...]:
        own = ("If", "Then", "what", "is", "the", "value", "of", "?", "The", "answer")
        return (*WORDS, *own, "=", "+", "-", "1", *LETTERS)

    def sample(self, rng: random.Random, cell: int) -> Example:
        names = rng.sample(LETTERS, cell)
        clauses = [
            _Clause(name, rng.choice((1, -1)), source)
            for name, source in zip(names, ["1", *names], strict=False)
        ]
        asked = rng.randrange(cell // 2, cell)
        value = 1
        for clause in clauses[: asked + 1]:
            value *= clause.sign
        shown = rng.sample(clauses, cell) if self.order == "permuted" else clauses
        prompt = f"If {_join(shown)}. Then, what is the value of {names[asked]}? "
        steps = self._steps(clauses[: asked + 1], shown)
        return Example(prompt, self.target(steps, f"The answer is {_sign(value)}1."), cell)

    def _steps(self, chain: list[_Clause], shown: list[_Clause]) -> Iterator[Step]:
        """Clause by clause along the chain. (The published wording of a step is not known.)"""
        value, left = 1, list(shown)
        for clause in chain:
            computation = str(clause)
            if clause.source != "1":
                computation += f" = {_sign(clause.sign)} {_sign(value)}1"
            value *= clause.sign
            left.remove(clause)
            output = f"{clause.name} = {_sign(value)}1"
            yield Step(str(clause), computation, output, "", _join(left))

    def solve(self, prompt: str) -> str:
        words = self.vocabulary.split(prompt)
        body = words[1 : words.index(".")]
        clauses = {body[at]: body[at + 2 : at + 4] for at in range(0, len(body), 5)}
        asked, value = words[-2], 1
        while asked != "1":
            sign, asked = clauses[asked]
            value *= -1 if sign == "-" else 1
        return f"The answer is {_sign(value)}1."


def _sign(value: int) -> str:
    return "+" if value > 0 else "-"


def _join(clauses: list[_Clause]) -> str:
    return ", ".join(map(str, clauses))
