"""Addition, sums modulo 10 and polynomials (Kazemnejad et al., 2023, arXiv:2305.19466).

addition    Compute 5 3 + 1 9 ?                                  The answer is 7 2.
sum         Compute: 5 + 3 .                                     The answer is 8 .
polynomial  Evaluate at x = 2 in 3 * x ** 2 + - 1 * x ** 0 ?     The answer is 1.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from lcm.data.tasks.scratchpad import WORDS, Reasoning, Step
from lcm.data.tasks.task import Example, digits, number

DIGITS = tuple("0123456789")
ANSWER = ("The", "answer", "is")


@dataclasses.dataclass(frozen=True)
class Addition(Reasoning):
    """The sum of two numbers; its length is the digits of the longer, and its cells are pairs.

    A scratchpad goes from the least significant digit; where a carry is left, a last step of input
    `0, 0` puts it out.
    """

    @property
    def words(self) -> tuple[str, ...]:
        return (*WORDS, *ANSWER, *DIGITS, "Compute", "+", "?", "=", "carry", "[", "]")

    def cells(self, length: int) -> Sequence[tuple[int, int]]:
        shorter = range(1, length)
        return [*((length, n) for n in shorter), *((n, length) for n in shorter), (length, length)]

    def sample(self, rng: random.Random, cell: tuple[int, int]) -> Example:
        a, b = (of_digits(rng, n) for n in cell)
        prompt = f"Compute {digits(a)} + {digits(b)} ? "
        return Example(prompt, self.target(_carries(a, b), _is(a + b)), max(cell))

    def solve(self, prompt: str) -> str:
        words = self.vocabulary.split(prompt)
        plus = words.index("+")
        return _is(number(words[1:plus]) + number(words[plus + 1 : -1]))


@dataclasses.dataclass(frozen=True)
class Sum(Reasoning):
    """The sum modulo 10 of digits from 1 to 9; its length is how many there are."""

    @property
    def words(self) -> tuple[str, ...]:
        return (*WORDS, *ANSWER, *DIGITS, "Compute", "+", "=", "sum", "[", "]")

    def sample(self, rng: random.Random, cell: int) -> Example:
        values = [rng.randint(1, 9) for _ in range(cell)]
        answer = f"The answer is {sum(values) % 10} ."
        prompt = f"Compute: {' + '.join(map(str, values))} . "
        return Example(prompt, self.target(self._steps(values), answer), cell)

    def _steps(self, values: list[int]) -> Iterator[Step]:
        total = 0
        for at, value in enumerate(values):
            after = value + total
            yield Step(
                str(value),
                f"{value} + sum = {value} + {total} =",
                str(after % 10),
                f"sum: {digits(after)} = {after % 10}",
                " + ".join(map(str, values[at + 1 :])),
            )
            total = after % 10

    def solve(self, prompt: str) -> str:
        values = [int(word) for word in self.vocabulary.split(prompt) if word in DIGITS]
        return f"The answer is {sum(values) % 10} ."


@dataclasses.dataclass(frozen=True)
class Polynomial(Reasoning):
    """A polynomial modulo 10 at a point of -2 ... 2; its length is the number of terms.

    Coefficients are of -3 ... 3 and degrees of 0 ... 3, in any order and repeated.
    """

    @property
    def words(self) -> tuple[str, ...]:
        own = ("Evaluate", "at", "x", "?", "+", "-", "*", "**", "=", "acc", "[", "]")
        return (*WORDS, *ANSWER, *DIGITS, *own)

    def sample(self, rng: random.Random, cell: int) -> Example:
        x = rng.randint(-2, 2)
        terms = [(rng.randint(-3, 3), rng.randint(0, 3)) for _ in range(cell)]
        value = sum(c * x**degree for c, degree in terms) % 10
        prompt = f"Evaluate at x = {digits(x)} in {_terms(terms)} ? "
        return Example(prompt, self.target(_horner(x, terms), _is(value)), cell)

    def solve(self, prompt: str) -> str:
        point, _, terms = prompt.removeprefix("Evaluate at x =").partition(" in ")
        terms = terms.rstrip(" ?")
        signed = terms.replace("- ", "-").replace("x", f"({point.replace(' ', '')})")
        value = sum(_product(term) for term in signed.split(" + "))
        return _is(value % 10)


def of_digits(rng: random.Random, count: int) -> int:
    """A number of so many digits, the first of several not 0."""
    return rng.randrange(10 ** (count - 1) if count > 1 else 0, 10**count)


def _is(value: int) -> str:
    return f"The answer is {digits(value)}."


def _carries(a: int, b: int) -> Iterator[Step]:
    """The steps of written addition."""
    left, right, carry = list(str(a)), list(str(b)), 0
    pairs = list(zip_longest(left[::-1], right[::-1], fillvalue="0"))
    for at, (one, two) in enumerate([*pairs, ("0", "0")]):
        if at == len(pairs) and not carry:
            return
        both = int(one) + int(two)
        total = both + carry
        rest = [" ".join(part[: max(0, len(part) - at - 1)]) for part in (left, right)]
        computation = f"{one} + {two} + carry = {digits(both)} + {carry} = {digits(total)}"
        carry = total // 10
        yield Step(
            f"{one}, {two}",
            computation,
            str(total % 10),
            f"carry: {carry}",
            f"{rest[0]} + {rest[1]}".strip(),
        )


def _terms(terms: Sequence[tuple[int, int]]) -> str:
    return " + ".join(f"{digits(c)} * x ** {degree}" for c, degree in terms)


def _horner(x: int, terms: Sequence[tuple[int, int]]) -> Iterator[Step]:
    """Term by term, the sum so far kept modulo 10. (The published format of this is not known.)"""
    acc = 0
    for at, (c, degree) in enumerate(terms):
        value = c * x**degree
        yield Step(
            _terms([(c, degree)]),
            f"{digits(c)} * {digits(x)} ** {degree} = {digits(value)} + acc = "
            f"{digits(value)} + {acc} = {digits(value + acc)}",
            str((value + acc) % 10),
            f"acc: {(value + acc) % 10}",
            _terms(terms[at + 1 :]),
        )
        acc = (value + acc) % 10


def _product(term: str) -> int:
    """The value of `-3 * (-2) ** 2`."""
    coefficient, _, power = term.partition(" * ")
    base, _, degree = power.partition(" ** ")
    return int(coefficient) * int(base.strip("() ")) ** int(degree)
