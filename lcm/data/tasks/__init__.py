"""Synthetic tasks of a stated length: text, a vocabulary, and a checker of answers.

A spec is a name of `TASKS` with fields: `addition`, `copy_rsc,train=2-12,test=13-24,symbols=36`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from lcm.data.tasks.arithmetic import Addition, Polynomial, Sum
from lcm.data.tasks.copying import Copy, Reverse
from lcm.data.tasks.counting import Count, Majority, Mode, Modular
from lcm.data.tasks.dyck import Dyck
from lcm.data.tasks.hinted import HintedAddition
from lcm.data.tasks.lego import Lego
from lcm.data.tasks.lists import Parity, Sort
from lcm.data.tasks.pcfg import Pcfg
from lcm.data.tasks.recall import Induction, Mqar, Ngram
from lcm.data.tasks.scan import Scan
from lcm.data.tasks.source import PackedRows, TaskSource, batch, longest
from lcm.data.tasks.task import PARTS, Example, Part, Task, span
from lcm.data.tasks.vocabulary import Words
from lcm.errors import ConfigError

__all__ = [
    "PARTS",
    "PREFIX",
    "TASKS",
    "Example",
    "PackedRows",
    "Part",
    "Task",
    "TaskSource",
    "Words",
    "batch",
    "is_task",
    "longest",
    "make",
    "size",
    "source",
    "span",
]

PREFIX = "task:"  # of data.source and data.tokenizer

TASKS: dict[str, Callable[..., Task]] = {
    **{f"copy_{v}": functools.partial(Copy, variant=v) for v in Copy.variants},
    **{f"reverse_{v}": functools.partial(Reverse, variant=v) for v in Reverse.variants},
    "addition": Addition,
    "addition_hinted": HintedAddition,
    "polynomial": Polynomial,
    "sum": Sum,
    "sort": Sort,
    "sort_digits": functools.partial(Sort, multi_digit=True),
    "parity": Parity,
    "lego": Lego,
    "lego_permuted": functools.partial(Lego, order="permuted"),
    "scan": Scan,
    "pcfg": Pcfg,
    "ngram": Ngram,
    "induction": Induction,
    "mqar": Mqar,
    "count": Count,
    "mode": Mode,
    "majority": Majority,
    "modular": Modular,
    "dyck": Dyck,
    "dyck_shuffle": functools.partial(Dyck, shuffle=True),
}
_OF_SOURCE = {"size": 100_000, "seed": 0}


def is_task(spec: str) -> bool:
    """Whether `data.source` or `data.tokenizer` names a task."""
    return spec.startswith(PREFIX)


def make(spec: str) -> Task:
    """The task of a spec, with or without the prefix; `size` and `seed` of a source are ignored.

    Raises:
        ConfigError: for an unknown task or field, or a value that cannot be.
    """
    return _parse(spec)[0]


def source(spec: str) -> TaskSource:
    """The training examples of a spec: `size` of them (100000), drawn by `seed` (0).

    Raises:
        ConfigError: as `make`.
    """
    task, options = _parse(spec)
    return TaskSource(task, spec.removeprefix(PREFIX), **options)


def size(spec: str) -> int:
    """How many training examples a spec asks for."""
    return _parse(spec)[1]["size"]


def _parse(spec: str) -> tuple[Task, dict[str, int]]:
    name, *assignments = spec.removeprefix(PREFIX).split(",")
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is unknown: choose from {', '.join(TASKS)}")
    defaults = {f.name: getattr(TASKS[name](), f.name) for f in dataclasses.fields(TASKS[name]())}
    values: dict[str, Any] = {}
    for assignment in assignments:
        field, _, text = assignment.partition("=")
        known = {**defaults, **_OF_SOURCE}
        if field not in known:
            raise ConfigError(
                f"task {name} has no field {field!r}: it has {', '.join(known)}, as in "
                f"{name},train=1-4"
            )
        values[field] = _value(field, text, known[field])
    options = {key: values.pop(key, default) for key, default in _OF_SOURCE.items()}
    if options["size"] < 1:
        raise ConfigError(f"size={options['size']} of task {name} must be at least 1")
    return TASKS[name](**values), options


def _value(field: str, text: str, default: Any) -> Any:
    """A value of the type of the default: `2-12`, `true`, a number, or the text itself."""
    try:
        if isinstance(default, tuple):
            low, _, high = text.partition("-")
            return int(low), int(high or low)
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(default)(text)
    except (KeyError, ValueError):
        like = f"{default[0]}-{default[1]}" if isinstance(default, tuple) else default
        raise ConfigError(
            f"{field}={text!r} cannot be read: write it like {field}={like}"
        ) from None
