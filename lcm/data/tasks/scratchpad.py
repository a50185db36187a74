"""Scratchpads of steps with five fields, each of which can be left out.

    Thinking step by step:  STEP # STEP # ... . Thus, ANSWER
    STEP = in INPUT comp COMPUTATION out OUTPUT [ VARIABLES ] re REMAINING

Format: Kazemnejad et al., NeurIPS 2023, arXiv:2305.19466.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from lcm.data.tasks.task import Task
from lcm.errors import ConfigError

FIELDS = ("in", "comp", "out", "vars", "re")
START, STEP, END = "Thinking step by step:", "#", ". Thus,"
WORDS = ("Thinking", "step", "by", ":", STEP, ".", "Thus", ",", *(f for f in FIELDS if f != "vars"))


class Step(NamedTuple):
    """What one step of a computation says; a task without variables leaves them empty."""

    input: str
    computation: str
    output: str
    variables: str
    remaining: str

    def text(self, fields: frozenset[str]) -> str:
        parts = {
            "in": f"in {self.input}",
            "comp": f"comp {self.computation}",
            "out": f"out {self.output}",
            "vars": f"[ {self.variables} ]" if self.variables else "",
            "re": f"re {self.remaining}",
        }
        shown = [part.strip() for name, part in parts.items() if name in fields]
        return " ".join(filter(None, shown))


@dataclasses.dataclass(frozen=True)
class Reasoning(Task):
    """A task whose answer may follow its computation.

    `scratchpad` names the fields, such as `comp+out`; `all` is every one, empty none at all.
    """

    scratchpad: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = self._named() - set(FIELDS)
        if unknown:
            raise ConfigError(
                f"scratchpad={self.scratchpad!r} names {min(unknown)!r}: join some of "
                f"{', '.join(FIELDS)} by +, or write all"
            )

    def _named(self) -> frozenset[str]:
        if self.scratchpad == "all":
            return frozenset(FIELDS)
        return frozenset(filter(None, self.scratchpad.split("+")))

    def target(self, steps: Iterable[Step], answer: str) -> str:
        """The answer, after the steps if there is a scratchpad."""
        fields = self._named()
        if not fields:
            return answer
        shown = f" {STEP} ".join(step.text(fields) for step in steps)
        return f"{START}  {shown} {END} {answer}"

    def final(self, output: str) -> str:
        """What follows the last `Thus,`; without one, an output that should have it is wrong."""
        if not self._named():
            return output
        _, found, answer = output.rpartition("Thus")
        return answer.lstrip().removeprefix(",") if found else ""
