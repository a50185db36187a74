"""What a request asks of sampling, and what a batch of requests must therefore hold."""

import dataclasses
import math
import numbers
from collections.abc import Collection, Sequence
from typing import Any

from lcm.errors import UserError

# What only narrows a draw, and so means nothing where the largest logit is taken.
_TRUNCATIONS = frozenset({"top_k", "top_p", "min_p", "typical_p", "eta", "epsilon"})

# What goes with another setting, or with the draw, and by itself asks for no processor.
_COMPANIONS = frozenset({"stop_ids", "max_new_tokens", "seed"}) | {
    "length_decay_start",
    "repetition_window",
    "eos_penalty_length",
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are drawn; every default leaves the model's distribution alone.

    Processors are applied in the order of the fields, after `banned`. `stop_ids` are the tokens
    that end a text; penalties never touch them, the settings of length do.
    """

    banned: tuple[int, ...] = ()  # tokens that are never drawn
    stop_ids: tuple[int, ...] = ()  # tokens that end the text
    min_new_tokens: int = 0  # no stop id before so many tokens
    max_new_tokens: int = 256  # the engine ends here, whatever the logits
    length_decay: float = 1.0  # stop ids gain |logit| (decay^(t - start) - 1) for t > start
    length_decay_start: int = 0
    repetition_penalty: float = 1.0  # of tokens in the window: prompt and generated
    repetition_window: int | None = None  # the last tokens it sees; None is all of them
    frequency_penalty: float = 0.0  # times the count among generated tokens
    presence_penalty: float = 0.0  # for being among generated tokens
    eos_penalty: float = 0.0  # stop ids lose penalty * max(0, 1 - t / eos_penalty_length)
    eos_penalty_length: int = 0
    no_repeat_ngram: int = 0  # n-grams, of prompt and generated, that may come once; 0 is off
    temperature: float = 1.0  # 0 takes the largest logit
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon: float = 0.0
    eta: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _typed(field.name, getattr(self, field.name), field.default)
            object.__setattr__(self, field.name, value)
        for name in ("banned", "stop_ids"):
            _check(name, getattr(self, name), "ids from 0", min((0, *getattr(self, name))) >= 0)
        for name, low, remedy in _AT_LEAST:
            value = getattr(self, name)
            _check(name, value, f"at least {low}", value >= low, remedy)
        for name, remedy in _POSITIVE:
            value = getattr(self, name)
            _check(name, value, "above 0 and finite", 0 < value < math.inf, remedy)
        for name, remedy in _SHARES:
            value = getattr(self, name)
            _check(name, value, "above 0 and at most 1", 0 < value <= 1, remedy)
        for name in ("min_p", "epsilon", "eta"):
            value = getattr(self, name)
            _check(name, value, "from 0 to 1", 0 <= value <= 1, "0 switches it off")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _check(name, value, "finite", math.isfinite(value), "0 switches it off")
        window = self.repetition_window
        _check("repetition_window", window, "at least 0", window is None or window >= 0, "or None")
        _check("seed", self.seed, "from 0 to 2**32 - 1", 0 <= self.seed < 1 << 32)
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens="
                f"{self.max_new_tokens}: raise the one or lower the other"
            )
        if self.eos_penalty and not self.eos_penalty_length:
            raise UserError(
                f"eos_penalty={self.eos_penalty} has no effect without eos_penalty_length: give "
                "the length that is wanted"
            )


_AT_LEAST = (
    ("min_new_tokens", 0, "0 switches it off"),
    ("max_new_tokens", 1, ""),
    ("length_decay_start", 0, ""),
    ("eos_penalty", 0, "0 switches it off"),
    ("eos_penalty_length", 0, ""),
    ("no_repeat_ngram", 0, "0 switches it off"),
    ("temperature", 0, "0 takes the largest logit"),
    ("top_k", 0, "0 switches it off"),
)
_POSITIVE = (("length_decay", "1 switches it off"), ("repetition_penalty", "1 switches it off"))
_SHARES = (
    ("top_p", "top_k=1 keeps the likeliest token, 1 switches it off"),
    ("typical_p", "1 switches it off"),
)


def _typed(name: str, value: Any, default: Any) -> Any:
    """A value as its setting has it; JSON may hold one of another kind.

    Raises:
        UserError: for one of another kind.
    """
    if isinstance(default, tuple):
        if isinstance(value, Collection) and not isinstance(value, str) and all(map(_whole, value)):
            return tuple(map(int, value))
        kind = "a list of token ids"
    elif isinstance(default, float):
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            return value if isinstance(value, int | float) else float(value)
        kind = "a number"
    else:
        if _whole(value):
            return int(value)
        if value is None and default is None:
            return None
        kind = "a whole number below 2**32"
    raise UserError(f"{name}={value!r} must be {kind}")


def _whole(value: Any) -> bool:
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return integral and abs(value) < 1 << 32


def _check(name: str, value: object, limit: str, good: bool, remedy: str = "") -> None:
    if not good:
        raise UserError(f"{name}={value} must be {limit}{'; ' if remedy else ''}{remedy}")


def used(sampling: Sampling) -> frozenset[str]:
    """Names of the settings that ask for something to be done with the logits."""
    names = {
        field.name
        for field in dataclasses.fields(sampling)
        if getattr(sampling, field.name) != field.default
    }
    return frozenset(names - _COMPANIONS - (_TRUNCATIONS if sampling.temperature == 0 else set()))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static shape of a batch: what its rows may use, now or after a row is replaced.

    vocab: entries of the logits.
    capacity: the most tokens, of prompt and generation, that a row can come to.
    uses: names of the settings that some row uses.
    ring: how many of the last tokens are kept.
    greedy: no row draws at random.
    """

    vocab: int
    capacity: int
    uses: frozenset[str]
    ring: int
    greedy: bool

    def window(self, sampling: Sampling) -> int | None:
        """The forgetting window of a row; None where it never forgets anything."""
        window = sampling.repetition_window
        return None if window is None or window >= self.capacity else window

    def check(self, settings: Sequence[Sampling]) -> None:
        """Refuses rows that the plan was not made for."""
        more = plan(settings, self.vocab, self.capacity)
        if not (more.uses <= self.uses and more.ring <= self.ring and self.greedy <= more.greedy):
            raise ValueError("the plan of a batch must be made of every row that comes into it")


def plan(settings: Sequence[Sampling], vocab: int, capacity: int) -> Plan:
    """The smallest plan for these rows, which are all that the batch will ever hold.

    Raises:
        UserError: for ids outside of the vocabulary, and for a row that could draw nothing.
    """
    uses = frozenset().union(*map(used, settings))
    draft = Plan(vocab, capacity, uses, 0, all(s.temperature == 0 for s in settings))
    windows = [draft.window(s) for s in settings if s.repetition_penalty != 1]
    ring = max((w for w in windows if w is not None), default=0)
    for sampling in settings:
        _check_ids(sampling, vocab)
    return dataclasses.replace(draft, ring=capacity if "no_repeat_ngram" in uses else ring)


def _check_ids(sampling: Sampling, vocab: int) -> None:
    for name in ("banned", "stop_ids"):
        for token in getattr(sampling, name):
            _check(name, token, f"below the {vocab} entries of the vocabulary", token < vocab)
    kept_out = {*sampling.banned, *(sampling.stop_ids if sampling.min_new_tokens else ())}
    if len(kept_out) == vocab:
        raise UserError(
            f"banned (and stop_ids, for min_new_tokens) leave none of {vocab} tokens: ban fewer"
        )
