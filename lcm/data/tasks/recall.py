"""Looking something up in what was read: n-grams, induction, associative recall.

    ngram      find g1 g2 : s1 ... sn |               the symbol after g1 g2 in s
    induction  s1 ... ? s ... sn ?                    the symbol after the first ?
    mqar       k1 v1 ... kD vD | k3 k1 ...            v3 v1 ...

Associative recall is that of zoology (Arora et al., 2023, arXiv:2312.04927) as prompt and target:
the published one interleaves queries and values with filler in one row.
"""

import dataclasses
import random
from typing import ClassVar

from lcm.data.tasks.copying import SYMBOLS
from lcm.data.tasks.task import Example, Lengths, Task
from lcm.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Ngram(Task):
    """The symbol after an n-gram that occurs once in a string, before its end; length is its."""

    train: Lengths = (8, 20)
    test: Lengths = (21, 40)
    n: int = 2
    symbols: int = 26

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "n", self.n, 1, self.train[0] - 1)
        _check(self, "symbols", self.symbols, 4, len(SYMBOLS))

    @property
    def words(self) -> tuple[str, ...]:
        return ("find", ":", "|", *SYMBOLS[: self.symbols])

    def sample(self, rng: random.Random, cell: int) -> Example:
        while True:
            string = rng.choices(SYMBOLS[: self.symbols], k=cell)
            grams = [tuple(string[at : at + self.n]) for at in range(cell - self.n + 1)]
            unique = [at for at, gram in enumerate(grams[:-1]) if grams.count(gram) == 1]
            if unique:
                at = rng.choice(unique)
                prompt = f"find {' '.join(grams[at])} : {' '.join(string)} | "
                return Example(prompt, string[at + self.n], cell)

    def solve(self, prompt: str) -> str:
        text = " ".join(self.vocabulary.split(prompt))
        gram, _, string = text.removeprefix("find").partition(":")
        return string.partition(gram)[2].split()[0]


@dataclasses.dataclass(frozen=True)
class Induction(Task):
    """The symbol that followed a special one, which comes again at the end; 16 symbols."""

    train: Lengths = (4, 64)
    test: Lengths = (65, 256)
    shortest: ClassVar[int] = 2

    @property
    def words(self) -> tuple[str, ...]:
        return ("?", *SYMBOLS[:16])

    def sample(self, rng: random.Random, cell: int) -> Example:
        string = rng.choices(SYMBOLS[:16], k=cell)
        at = rng.randrange(cell)
        return Example(" ".join([*string[:at], "?", *string[at:], "? "]), string[at], cell)

    def solve(self, prompt: str) -> str:
        words = self.vocabulary.split(prompt)
        return words[words.index("?") + 1]


@dataclasses.dataclass(frozen=True)
class Mqar(Task):
    """Values of keys in another order than they were told in; length is the number of pairs."""

    train: Lengths = (2, 8)
    test: Lengths = (9, 32)
    symbols: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "symbols", self.symbols, self.test[1], 4096)

    @property
    def words(self) -> tuple[str, ...]:
        numbers = range(self.symbols)
        return ("|", *(f"k{n}" for n in numbers), *(f"v{n}" for n in numbers))

    def sample(self, rng: random.Random, cell: int) -> Example:
        keys, values = (rng.sample(range(self.symbols), cell) for _ in range(2))
        asked = rng.sample(range(cell), cell)
        told = " ".join(f"k{k} v{v}" for k, v in zip(keys, values, strict=True))
        prompt = f"{told} | {' '.join(f'k{keys[at]}' for at in asked)} | "
        return Example(prompt, " ".join(f"v{values[at]}" for at in asked), cell)

    def solve(self, prompt: str) -> str:
        told, _, asked = " ".join(self.vocabulary.split(prompt)[:-1]).partition(" | ")
        words = told.split()
        value = dict(zip(words[::2], words[1::2], strict=True))
        return " ".join(value[key] for key in asked.split())


def _check(task: Task, field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{field}={value} of {type(task).__name__} must lie from {low} to {high}")
