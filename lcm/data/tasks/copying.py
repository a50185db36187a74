"""Copying and reversing (Kazemnejad et al., NeurIPS 2023, arXiv:2305.19466).

rsc    Copy: a a a [SEP]                  a a a
rsc2x  Copy: a a a [SEP]                  a a a a a a
rdc    Replace a with b in a a a [SEP]    b b b
cmc    Copy: a b c [SEP]                  a b c
cmc2x  Copy: a b c [SEP]                  a b c [NEXT] a b c
mc     Reverse: a b c [SEP]               c b a
mc2x   Reverse: a b c [SEP]               c b a [NEXT] c b a
mcrv   Reverse: a b c [SEP]               c b a [NEXT] a b c
"""

import dataclasses
import random

from lcm.data.tasks.task import Example, Lengths, Task
from lcm.errors import ConfigError

SYMBOLS = tuple(f"{letter}{digit}" for letter in "abcdefghij" for digit in range(10))
NEXT = "[NEXT]"


@dataclasses.dataclass(frozen=True)
class _Strings(Task):
    """A string of symbols and what is to be made of it; `symbols` is how many there are."""

    train: Lengths = (2, 20)
    test: Lengths = (21, 40)
    variant: str = ""
    symbols: int = 100

    variants = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in self.variants:
            known = ", ".join(self.variants)
            raise ConfigError(f"variant={self.variant!r} is unknown: choose from {known}")
        if not 2 <= self.symbols <= len(SYMBOLS):
            raise ConfigError(f"symbols={self.symbols} must lie from 2 to {len(SYMBOLS)}")

    @property
    def words(self) -> tuple[str, ...]:
        frame = ("Copy", "Reverse", "Replace", "with", "in", ":", "[SEP]", NEXT)
        return (*frame, *SYMBOLS[: self.symbols])


@dataclasses.dataclass(frozen=True)
class Copy(_Strings):
    """Give a string back: one symbol repeated (`rs`), replaced (`rd`), or any symbols (`cm`)."""

    variant: str = "cmc"

    variants = ("rsc", "rsc2x", "rdc", "cmc", "cmc2x")

    def sample(self, rng: random.Random, cell: int) -> Example:
        symbols = SYMBOLS[: self.symbols]
        if self.variant == "rdc":
            old, new = rng.sample(symbols, 2)
            prompt = f"Replace {old} with {new} in {' '.join([old] * cell)} [SEP] "
            return Example(prompt, " ".join([new] * cell), cell)
        one = self.variant.startswith("rsc")
        string = [rng.choice(symbols)] * cell if one else rng.choices(symbols, k=cell)
        text = " ".join(string)
        target = {"rsc2x": f"{text} {text}", "cmc2x": f"{text} {NEXT} {text}"}
        return Example(f"Copy: {text} [SEP] ", target.get(self.variant, text), cell)

    def solve(self, prompt: str) -> str:
        words = self.vocabulary.split(prompt)[:-1]
        if self.variant == "rdc":
            _, _, _, new, _, *string = words
            return " ".join(new for _ in string)
        string = words[2:]
        between = [NEXT] if self.variant == "cmc2x" else []
        return " ".join([*string, *between, *string] if self.variant.endswith("2x") else string)


@dataclasses.dataclass(frozen=True)
class Reverse(_Strings):
    """Give a string of any symbols back from its end."""

    variant: str = "mc"

    variants = ("mc", "mc2x", "mcrv")

    def sample(self, rng: random.Random, cell: int) -> Example:
        string = rng.choices(SYMBOLS[: self.symbols], k=cell)
        text, back = " ".join(string), " ".join(reversed(string))
        target = {"mc": back, "mc2x": f"{back} {NEXT} {back}", "mcrv": f"{back} {NEXT} {text}"}
        return Example(f"Reverse: {text} [SEP] ", target[self.variant], cell)

    def solve(self, prompt: str) -> str:
        string = self.vocabulary.split(prompt)[2:-1]
        back = string[::-1]
        after = {"mc": [], "mc2x": [NEXT, *back], "mcrv": [NEXT, *string]}
        return " ".join(back + after[self.variant])
