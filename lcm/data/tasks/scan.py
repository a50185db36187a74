"""SCAN, split by the number of actions (Lake and Baroni, ICML 2018, arXiv:1711.00350).

    Solve: walk after turn right [SEP]       Right Walk

The grammar has 20,910 commands:

    C -> S and S | S after S | S        S -> V twice | V thrice | V
    V -> D | D opposite/around          D -> U left | U right | turn left | turn right (and U alone)

Actions are renamed and the split is at 25 as in arXiv:2305.19466: 17,774 commands have at most 25
actions, of which a tenth (1,777) is validation, 15,997 are trained on, and 3,136 have 26 to 48.
"""

import dataclasses
import functools
from collections.abc import Hashable, Sequence

from lcm.data.documents import draw
from lcm.data.tasks.task import Example, Lengths, Part, Task

_ACTIONS = {"walk": "Walk", "look": "Look", "run": "Run", "jump": "Jump"}
_TURNS = {"left": "Left", "right": "Right"}
_TIMES = {"": 1, "twice": 2, "thrice": 3}


@dataclasses.dataclass(frozen=True)
class Scan(Task):
    """All commands, each once; the tenth with the lowest hashes is left out of training."""

    train: Lengths = (1, 25)
    test: Lengths = (26, 48)

    @property
    def words(self) -> tuple[str, ...]:
        own = ("Solve", ":", "[SEP]", "turn", "opposite", "around", "twice", "thrice")
        pairs = (*_ACTIONS.items(), *_TURNS.items())
        return (*own, "and", "after", *(word for pair in pairs for word in pair))

    def cells(self, length: int) -> Sequence[Hashable]:
        return []  # everything is in the pool

    def pool(self, lengths: Sequence[int], part: Part) -> list[Example]:
        """Commands of these lengths: those to train on, or all the others."""
        trained = _trained(*self.train)
        return [
            Example(f"Solve: {command} [SEP] ", " ".join(actions), len(actions))
            for command, actions in commands().items()
            if len(actions) in lengths and (command in trained) == (part == "train")
        ]

    def solve(self, prompt: str) -> str:
        return " ".join(interpret(self.vocabulary.split(prompt)[2:-1]))


@functools.cache
def commands() -> dict[str, tuple[str, ...]]:
    """Every command with its actions, by enumeration of the grammar."""
    verbs: dict[str, tuple[str, ...]] = {word: (act,) for word, act in _ACTIONS.items()}
    for word, act in [*((w, (a,)) for w, a in _ACTIONS.items()), ("turn", ())]:
        for side, turn in _TURNS.items():
            verbs[f"{word} {side}"] = (turn, *act)
            verbs[f"{word} opposite {side}"] = (turn, turn, *act)
            verbs[f"{word} around {side}"] = (turn, *act) * 4
    sentences = {
        f"{verb} {times}".strip(): acts * count
        for verb, acts in verbs.items()
        for times, count in _TIMES.items()
    }
    found = dict(sentences)
    for one, first in sentences.items():
        for two, second in sentences.items():
            found[f"{one} and {two}"] = first + second
            found[f"{one} after {two}"] = second + first
    return found


@functools.cache
def _trained(low: int, high: int) -> frozenset[str]:
    within = [command for command, acts in commands().items() if low <= len(acts) <= high]
    within.sort(key=draw)
    return frozenset(within[len(within) // 10 :])


def interpret(words: list[str]) -> list[str]:
    """The actions of a command, by reading it: what `commands` builds, taken apart."""
    for link in ("and", "after"):
        if link in words:
            at = words.index(link)
            first, second = interpret(words[:at]), interpret(words[at + 1 :])
            return first + second if link == "and" else second + first
    if words[-1] in _TIMES:
        return interpret(words[:-1]) * _TIMES[words[-1]]
    acts = [] if words[0] == "turn" else [_ACTIONS[words[0]]]
    if len(words) == 1:
        return acts
    turn = [_TURNS[words[-1]]]
    return {"opposite": turn * 2 + acts, "around": (turn + acts) * 4}.get(words[1], turn + acts)
