"""String functions in prefix form, split by how many there are: PCFG SET's productivity.

    Solve: append reverse A1 B2 , C3 [SEP]       B2 A1 C3

    S -> unary S | binary S , S | X        X -> symbol X | symbol

copy x = x; reverse; shift x1..xn = x2..xn x1; swap_first_last; repeat x = x x; echo x = x1..xn xn;
append x , y = x y; prepend x , y = y x; remove_first x , y = y; remove_second x , y = x
(Hupkes et al., JAIR 2020, arXiv:1908.08351). The published expressions follow a distribution fitted
to natural language; here a function is binary with probability a quarter, arguments have 1 to 5
of 520 symbols, and expressions whose result is longer than 40 symbols are drawn again.
"""

import dataclasses
import random
from collections.abc import Callable

from lcm.data.tasks.task import Example, Lengths, Task
from lcm.errors import ConfigError

UNARY: dict[str, Callable[[list], list]] = {
    "copy": lambda x: x,
    "reverse": lambda x: x[::-1],
    "shift": lambda x: x[1:] + x[:1],
    "swap_first_last": lambda x: x[-1:] + x[1:-1] + x[:1] if len(x) > 1 else x,
    "repeat": lambda x: x + x,
    "echo": lambda x: x + x[-1:],
}
BINARY: dict[str, Callable[[list, list], list]] = {
    "append": lambda x, y: x + y,
    "prepend": lambda x, y: y + x,
    "remove_first": lambda x, y: y,
    "remove_second": lambda x, y: x,
}
SYMBOLS = tuple(f"{letter}{n}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for n in range(1, 21))
LONGEST = 40
_SHARE_BINARY = 0.25


@dataclasses.dataclass(frozen=True)
class Pcfg(Task):
    """The result of nested functions of strings; length is the number of functions."""

    train: Lengths = (1, 8)
    test: Lengths = (9, 35)
    symbols: int = len(SYMBOLS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.symbols <= len(SYMBOLS):
            raise ConfigError(f"symbols={self.symbols} must lie from 2 to {len(SYMBOLS)}")

    @property
    def words(self) -> tuple[str, ...]:
        return ("Solve", ":", "[SEP]", ",", *UNARY, *BINARY, *SYMBOLS[: self.symbols])

    def sample(self, rng: random.Random, cell: int) -> Example:
        while True:
            text, result = self._expression(rng, cell)
            if len(result) <= LONGEST:
                return Example(f"Solve: {text} [SEP] ", " ".join(result), cell)

    def _expression(self, rng: random.Random, functions: int) -> tuple[str, list[str]]:
        """An expression of so many functions, and its result."""
        if functions == 0:
            string = rng.choices(SYMBOLS[: self.symbols], k=rng.randint(1, 5))
            return " ".join(string), string
        if rng.random() < _SHARE_BINARY:
            name = rng.choice(list(BINARY))
            left = rng.randrange(functions)
            one, x = self._expression(rng, left)
            two, y = self._expression(rng, functions - 1 - left)
            return f"{name} {one} , {two}", BINARY[name](x, y)
        name = rng.choice(list(UNARY))
        inner, x = self._expression(rng, functions - 1)
        return f"{name} {inner}", UNARY[name](x)

    def solve(self, prompt: str) -> str:
        return " ".join(evaluate(self.vocabulary.split(prompt)[2:-1]))


def evaluate(words: list[str]) -> list[str]:
    """The result of an expression, read from its end with a stack: no recursion, no parse tree."""
    stack: list[list[str]] = [[]]
    for word in reversed(words):
        if word == ",":
            stack.append([])
        elif word in UNARY:
            stack.append(UNARY[word](stack.pop()))
        elif word in BINARY:
            x, y = stack.pop(), stack.pop()
            stack.append(BINARY[word](x, y))
        else:
            stack[-1] = [word, *stack[-1]]
    (result,) = stack
    return result
