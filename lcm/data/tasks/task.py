"""What a synthetic task is: examples of a length, a vocabulary, and a checker of answers."""

import dataclasses
import functools
import random
from collections.abc import Hashable, Sequence
from typing import ClassVar, Literal, NamedTuple, get_args

from lcm.data.tasks.vocabulary import Words
from lcm.errors import ConfigError, DataError

Lengths = tuple[int, int]  # first and last, both included
Part = Literal["train", "test"]
PARTS: tuple[Part, ...] = get_args(Part)


class Example(NamedTuple):
    """A prompt to be read, the text to be given for it, and the length the task counts."""

    prompt: str
    target: str
    length: int


@dataclasses.dataclass(frozen=True)
class Task:
    """Examples by length; those trained on are shorter than those tested on.

    A cell is what examples are spread evenly over: a length, or a pair of them. `sample` draws
    content once the cell is given. `solve` works the answer out from a prompt alone, by another
    way than `sample` where there is one.
    """

    train: Lengths = (1, 8)
    test: Lengths = (9, 16)
    shortest: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name, (low, high) in (("train", self.train), ("test", self.test)):
            if not self.shortest <= low <= high:
                raise ConfigError(
                    f"{name} lengths {low}-{high} of {type(self).__name__} are no range from "
                    f"{self.shortest} up: write {name}=LOW-HIGH"
                )
        if self.train[1] >= self.test[0]:
            raise ConfigError(
                f"train lengths {_range(self.train)} and test lengths {_range(self.test)} of "
                f"{type(self).__name__} overlap: begin the test at {self.train[1] + 1} or later"
            )

    @property
    def words(self) -> tuple[str, ...]:
        """Every word and symbol of its texts."""
        raise NotImplementedError

    @functools.cached_property
    def vocabulary(self) -> Words:
        return Words(tuple(dict.fromkeys(self.words)))

    def cells(self, length: int) -> Sequence[Hashable]:
        """The cells of a length, none where there is no such example."""
        return [length]

    def sample(self, rng: random.Random, cell: Hashable) -> Example:
        """An example of a cell."""
        raise NotImplementedError

    def pool(self, lengths: Sequence[int], part: Part) -> list[Example] | None:
        """All examples of these lengths, where they can be told one by one; else None."""
        return None

    def solve(self, prompt: str) -> str:
        """The answer to a prompt."""
        raise NotImplementedError

    def final(self, output: str) -> str:
        """The answer that an output ends in: all of it, or what follows its scratchpad."""
        return output

    def check(self, prompt: str, output: str) -> bool:
        """Whether an output gives the right answer; blanks do not matter."""
        split = self.vocabulary.split
        try:
            return split(self.final(output)) == split(self.solve(prompt))
        except DataError:
            return False

    def draw(self, lengths: Sequence[int], size: int, seed: int, part: Part) -> "Sequence[Example]":
        """`size` examples spread evenly over the cells of these lengths, or all there are.

        Example i depends on task, seed, part and i alone.
        Raises DataError where these lengths have no examples.
        """
        pool = self.pool(lengths, part)
        cells = [cell for length in lengths for cell in self.cells(length)]
        if not (cells if pool is None else pool):
            raise DataError(f"{type(self).__name__} has no {part} examples of lengths {lengths}")
        if pool is None:
            return Drawn(self, cells, size, f"{part}/{seed}")
        random.Random(f"{part}/{seed}").shuffle(pool)
        return pool[:size]


class Drawn(Sequence[Example]):
    """Examples drawn when asked for: number i is of cell i modulo their number."""

    def __init__(self, task: Task, cells: Sequence[Hashable], size: int, salt: str) -> None:
        self._task, self._cells, self._size, self._salt = task, cells, size, salt

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(index)
        index %= self._size
        rng = random.Random(f"{self._salt}/{index}")
        return self._task.sample(rng, self._cells[index % len(self._cells)])


def digits(number: int) -> str:
    """A number as the task suites write it, digits spaced: 53 is `5 3`, -7 is `- 7`."""
    return " ".join(str(number))


def number(words: Sequence[str]) -> int:
    """The number that digits, spaced or not, stand for."""
    return int("".join(words))


def span(lengths: Lengths) -> range:
    """The lengths from the first to the last."""
    return range(lengths[0], lengths[1] + 1)


def _range(lengths: Lengths) -> str:
    return f"{lengths[0]}-{lengths[1]}"
