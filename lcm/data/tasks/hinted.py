"""Addition for length generalisation: reversed digits, index hints, room for the carry.

    a 6 b 7 c 5 + a 1 b 6 c 3 =              a 7 b 3 c 9 d 0            (576 + 361 = 0937)

Both operands have N digits, the answer N + 1 with zeros in front; the least significant digit comes
first if `reversed_digits`. Hints are a slice of 102 ordered markers that begins at random; a place
has the same marker in operands and answer, and they ascend in the order digits are written in
(Zhou et al., 2024, arXiv:2402.09371).
"""

import dataclasses
import random
import string
from collections.abc import Sequence

from lcm.data.tasks.arithmetic import DIGITS, of_digits
from lcm.data.tasks.task import Example, Lengths, Task
from lcm.errors import ConfigError

# Letters, then letters with a mark: 102 symbols in a fixed order, none of them a digit.
MARKERS = (*string.ascii_letters, *(f"{letter}'" for letter in string.ascii_letters[:50]))
SPACE = "_"


@dataclasses.dataclass(frozen=True)
class HintedAddition(Task):
    """Two numbers of N digits each; `spaces` puts a blank before digits with that probability.

    Random blanks are the augmentation of the same paper, in operands alone.
    """

    train: Lengths = (1, 40)
    test: Lengths = (41, 100)
    hints: bool = True
    reversed_digits: bool = True
    spaces: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hints and self.test[1] >= len(MARKERS):
            raise ConfigError(
                f"test={self.test} needs {self.test[1] + 1} markers, there are {len(MARKERS)}: "
                f"test up to {len(MARKERS) - 1} digits, or set hints=false"
            )
        if not 0 <= self.spaces < 1:
            raise ConfigError(f"spaces={self.spaces} is no probability below 1")

    @property
    def words(self) -> tuple[str, ...]:
        return (*DIGITS, "+", "=", SPACE, *(MARKERS if self.hints else ()))

    def sample(self, rng: random.Random, cell: int) -> Example:
        a, b = (of_digits(rng, cell) for _ in range(2))
        start = rng.randint(0, len(MARKERS) - cell - 1) if self.hints else 0
        markers = MARKERS[start : start + cell + 1] if self.hints else ()
        one, two = (self._write(str(n), markers, cell, rng) for n in (a, b))
        answer = self._write(str(a + b).zfill(cell + 1), markers, cell + 1, None)
        return Example(f"{one} + {two} = ", answer, cell)

    def _write(
        self, digits: str, markers: Sequence[str], count: int, rng: random.Random | None
    ) -> str:
        """Digits in their order, each after its marker. The marker belongs to the place."""
        places = list(digits[::-1])  # least significant first
        marked = zip(self._place_markers(markers, count), places, strict=True)
        written = [f"{marker} {digit}".strip() for marker, digit in marked]
        if not self.reversed_digits:
            written = written[::-1]
        if rng is not None and self.spaces:
            written = [f"{SPACE} {w}" if rng.random() < self.spaces else w for w in written]
        return " ".join(written)

    def _place_markers(self, markers: Sequence[str], count: int) -> Sequence[str]:
        """Markers of the places from the least significant on; they ascend as they are written."""
        if not markers:
            return [""] * count
        return markers[:count] if self.reversed_digits else markers[::-1][:count]

    def solve(self, prompt: str) -> str:
        words = [word for word in self.vocabulary.split(prompt)[:-1] if word != SPACE]
        plus = words.index("+")
        operands = [[w for w in side if w in DIGITS] for side in (words[:plus], words[plus + 1 :])]
        order = slice(None, None, -1 if self.reversed_digits else 1)
        total = sum(int("".join(digits[order])) for digits in operands)
        answer = str(total).zfill(len(operands[0]) + 1)[order]
        if not self.hints:
            return " ".join(answer)
        first = MARKERS.index(words[0])
        first -= 0 if self.reversed_digits else 1
        markers = MARKERS[first : first + len(answer)]
        return " ".join(f"{m} {digit}" for m, digit in zip(markers, answer, strict=True))
