"""Metrics of a run: `metrics.jsonl`, and the same numbers as TensorBoard events."""

import contextlib
import json
import math
import pathlib
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from lcm.errors import CheckpointError
from lcm.training.workdir import write_text

FILE = "metrics.jsonl"


class NoMetrics:
    """What the processes other than the first have in place of `Metrics`."""

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Drops them."""

    def close(self) -> None:
        """There is nothing to close."""


class Metrics:
    """Both files of a run; on a resume, what came after the step is dropped from both.

    Events are written record by record, in the thread that calls: a writer in the background
    reports a full disk where nobody can catch it.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        with _without_torch():
            from tensorboardX.record_writer import RecordWriter

        lines = workdir / FILE
        write_text(lines, "".join(f"{line}\n" for line in _lines_up_to(lines, step)))
        self.lines = lines.open("a", buffering=1)
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self.events = RecordWriter(str(folder / name))
        self._begin_events(step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line; single numbers also become TensorBoard scalars.

        Raises:
            CheckpointError: if there is no room.
        """
        numbers = {k: v for k, v in values.items() if isinstance(v, float | int)}
        try:
            self.lines.write(json.dumps({"step": step, **values}) + "\n")
            self._event(step, numbers)
        except OSError as error:
            raise CheckpointError(
                f"{self.lines.name} cannot be written ({error.strerror}): make room and run again"
            ) from error

    def close(self) -> None:
        """Closes the files. What could not be written has been said by `write`."""
        for file in (self.lines, self.events):
            with contextlib.suppress(OSError):
                file.close()

    def _begin_events(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        version = Event(wall_time=time.time(), file_version="brain.Event:2")
        # TensorBoard leaves out earlier events from this step on.
        purge = Event(wall_time=time.time(), step=step + 1, session_log=start)
        for event in (version, purge):
            self.events.write(event.SerializeToString())

    def _event(self, step: int, numbers: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self.events.write(event.SerializeToString())
        self.events.flush()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Importing tensorboardX imports torch if there is one: seconds of a start for nothing here."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None
    try:
        yield
    finally:
        del sys.modules["torch"]


def _lines_up_to(file: pathlib.Path, step: int) -> list[str]:
    kept = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # cut short when the process was killed
            continue
        if entry.get("step", math.inf) <= step:
            kept.append(line)
    return kept
