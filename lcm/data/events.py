"""Streams of events with times, made up or read: what happened, and when.

Made-up streams have the three properties of health records that Context Clues (arXiv:2412.16178)
measures, each by a number of its own: codes are said again, gaps differ, and new codes become rarer
ones as a stream goes on.
"""

import dataclasses
import json
import pathlib
from typing import NamedTuple

import numpy as np

from lcm.data.documents import draw
from lcm.errors import ConfigError, DataError


class Events(NamedTuple):
    """One stream: its name, int32 codes from 1 on `[N]`, and float64 times in seconds `[N]`, which
    never go back."""

    name: str
    codes_N: np.ndarray
    times_N: np.ndarray


@dataclasses.dataclass(frozen=True)
class SyntheticEvents:
    """`size` streams; stream i depends on the settings, the seed and i alone.

    copy: probability that a code is that of `lag` events before or later, drawn evenly, where there
        is one; else it is new.
    lag: the farthest that is copied from, 0 for anything before.
    codes: how many there are; new ones are drawn by Zipf's law, their weight r^-zipf by rank.
    progression: how much of `zipf` is lost from the first event to the last: at 1 the last new code
        is any of them, so that later events are harder to foresee.
    gap, irregularity: gaps are log-normal with this mean in seconds, and this standard deviation of
        their logarithm; 0 is a clock.

    Raises:
        ConfigError: naming the setting, its value and its limit.
    """

    size: int = 1000
    events: int = 256
    codes: int = 500
    copy: float = 0.3
    lag: int = 0
    zipf: float = 1.0
    progression: float = 0.0
    gap: float = 3600.0
    irregularity: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            **dict.fromkeys(("size", "events", "codes"), (1, 2**31)),
            **dict.fromkeys(("copy", "progression"), (0, 1)),
            **dict.fromkeys(("lag", "seed"), (0, 2**31)),
            "zipf": (0, 20),
            "gap": (1e-6, 1e12),
            "irregularity": (0, 20),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name}={value} of events must lie between {low} and {high}")

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        return f"events/{self.seed}/{index}"

    def __getitem__(self, index: int) -> Events:
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index])
        rank_K = np.log(np.arange(1, self.codes + 1))
        codes_N = np.zeros(self.events, np.int32)
        for n in range(self.events):
            reach = min(n, self.lag or n)
            if reach and rng.random() < self.copy:
                codes_N[n] = codes_N[n - rng.integers(1, reach + 1)]
                continue
            share = n / max(1, self.events - 1)
            weight_K = np.exp(-self.zipf * (1 - self.progression * share) * rank_K)
            codes_N[n] = 1 + np.searchsorted(weight_K.cumsum(), rng.random() * weight_K.sum())
        # Of mean 1 whatever the spread.
        spread = self.irregularity
        gaps_N = np.exp(spread * rng.standard_normal(self.events) - spread**2 / 2)
        times_N = self.gap * np.append(0.0, gaps_N[1:]).cumsum()
        return Events(self.name(index), codes_N, times_N)


class JsonlEvents:
    """Streams of a JSONL file: an object a line with `codes` and `times`, lists of one length.

    Codes are strings or numbers, numbered from 1 in the order they are first seen; `vocabulary` has
    them. Times are numbers, in seconds. A `name` is optional; the line's number is one.

    Raises:
        DataError: naming the line, for what is not such, is empty, or goes back in time.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path)
        self.vocabulary: dict[str | int, int] = {}
        self._streams: list[Events] = []
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._streams.append(self._stream(line, number))
        if not self._streams:
            raise DataError(f"{self.path} has no streams: write a JSON object a line")

    def __len__(self) -> int:
        return len(self._streams)

    def name(self, index: int) -> str:
        return self._streams[index].name

    def __getitem__(self, index: int) -> Events:
        return self._streams[index]

    def _stream(self, line: str, number: int) -> Events:
        where = f"{self.path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({error}): mend it or remove it") from None
        if not isinstance(record, dict) or not {"codes", "times"} <= record.keys():
            raise DataError(f'{where} has no codes and times: write {{"codes": [], "times": []}}')
        codes, times = record["codes"], record["times"]
        if not isinstance(codes, list) or not isinstance(times, list) or not codes:
            raise DataError(f"{where}: codes and times are no lists of one event or more")
        if len(codes) != len(times):
            raise DataError(f"{where} has {len(codes)} codes and {len(times)} times: give one each")
        for kind, values, types in (("code", codes, (str, int)), ("time", times, (int, float))):
            wrong = [v for v in values if not isinstance(v, types) or isinstance(v, bool)]
            if wrong:
                wanted = "a string or a whole number" if kind == "code" else "a number of seconds"
                raise DataError(f"{where}: the {kind} {wrong[0]!r} is not {wanted}")
        times_N = np.array(times, np.float64)
        bad_N = ~np.isfinite(times_N) | np.append(False, np.diff(times_N) < 0)
        if bad_N.any():
            at = int(bad_N.argmax())
            raise DataError(
                f"{where}: time {times[at]} of event {at + 1} is not finite or goes back: sort the "
                "events by time"
            )
        ids = [self.vocabulary.setdefault(code, len(self.vocabulary) + 1) for code in codes]
        name = f"{self.path.name}:{record.get('name', number)}"
        return Events(name, np.array(ids, np.int32), times_N)


def split(streams: SyntheticEvents | JsonlEvents, fraction: float) -> tuple[list[int], list[int]]:
    """Indices trained on and held out; a stream's name alone decides.

    Raises:
        ConfigError: for a fraction that is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"fraction={fraction} held out must lie between 0 and 1")
    held = [draw(streams.name(index)) < fraction for index in range(len(streams))]
    return [i for i, out in enumerate(held) if not out], [i for i, out in enumerate(held) if out]
