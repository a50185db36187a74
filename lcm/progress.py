"""Progress on a terminal as a bar with rate and ETA, elsewhere as a plain line now and then."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

_QUIET = 10.0  # seconds between plain lines


class Report(Protocol):
    """Called with tokens done, tokens in all, and a short text such as the loss."""

    def __call__(self, done: int, total: int, text: str = "") -> None: ...


@contextlib.contextmanager
def progress(title: str) -> Iterator[Report]:
    """A progress report in tokens, on standard error."""
    with _bar(title) if sys.stderr.isatty() else _lines(title) as report:
        yield report


def silent(done: int, total: int, text: str = "") -> None:
    """The report of a process that leaves it to another."""


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Report]:
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TextColumn("{task.fields[text]}"),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task, speed = bar.add_task(title, total=None, rate="", text=""), _Speed()

        def report(done: int, total: int, text: str = "") -> None:
            bar.update(task, completed=done, total=total, rate=speed(done, total), text=text)

        yield report


@contextlib.contextmanager
def _lines(title: str) -> Iterator[Report]:
    speed, last = _Speed(), time.monotonic()

    def report(done: int, total: int, text: str = "") -> None:
        nonlocal last
        rate, now = speed(done, total), time.monotonic()
        if now - last >= _QUIET or done >= total:
            last = now
            print(f"{title} {done / total:.0%} {rate} {text}", file=sys.stderr, flush=True)

    yield report


class _Speed:
    """Tokens per second and ETA since the first report, which leaves compilation out."""

    def __init__(self):
        self.first: tuple[float, int] | None = None

    def __call__(self, done: int, total: int) -> str:
        now = time.monotonic()
        if self.first is None:
            self.first = now, done
        begun, first = self.first
        if done == first:
            return ""
        rate = (done - first) / max(now - begun, 1e-9)
        minutes, seconds = divmod(round((total - done) / rate), 60)
        return f"{rate:,.0f} tokens/s, {minutes}:{seconds:02d} left"
