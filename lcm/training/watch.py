"""A thread beside the loop: it tells that the process is alive, and ends one that hangs.

Each process writes `heartbeat-<process>.json` into the workdir. A step of several processes takes
as long as the slowest of them, so that they differ only in the time for which they wait for data: a
straggler is the one with many `data_seconds`, or, in a hang, with an earlier step than the others.
"""

import contextlib
import faulthandler
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax

from lcm.errors import CheckpointError
from lcm.parallel import hosts
from lcm.training.workdir import write_text

PERIOD = 5.0  # seconds between heartbeats
HUNG = 70  # exit status: EX_SOFTWARE of sysexits.h
FIRST = 10  # the first step compiles, and may take so many times as long


class Watch:
    """The last step that ended, seconds spent on data, and what becomes of a run that hangs."""

    def __init__(self, folder: pathlib.Path, hang_seconds: int):
        self.folder, self.step, self.hang_seconds = folder, 0, hang_seconds
        self.process, self.alone = jax.process_index(), jax.process_count() == 1
        self.since, self.steps, self.data_seconds = time.monotonic(), 0, 0.0
        self.told = False

    def restored(self, step: int) -> None:
        """Notes the step that the run goes on from."""
        self.step, self.since = step, time.monotonic()

    def ended(self, step: int) -> None:
        """Notes that a step has ended, or a checkpoint after it: all that the loop does here."""
        self.steps += step > self.step
        self.step, self.since, self.told = step, time.monotonic(), False

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Counts the time of the block as spent on data."""
        begun = time.monotonic()
        yield
        self.data_seconds += time.monotonic() - begun

    def write(self) -> None:
        """Writes the heartbeat, whole; a full disk is for the checkpoints to report."""
        line = {
            "process": self.process,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": self.step,
            "time": time.time(),
            "data_seconds": round(self.data_seconds, 3),
        }
        with contextlib.suppress(CheckpointError):
            write_text(self.folder / f"heartbeat-{self.process}.json", json.dumps(line) + "\n")

    def look(self) -> None:
        """Reports a hang, once; one of several processes ends with `HUNG`, and so do the others."""
        limit = self.hang_seconds * (1 if self.steps else FIRST)
        silent = time.monotonic() - self.since
        if not limit or silent < limit or self.told:
            return
        self.told = True
        stacks = self.folder / f"hang-{self.process}.txt"
        for file in (stacks, None):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # no file, in notebooks
                _dump(file)
        kind = "warning" if self.alone else "error"
        print(
            f"lcm: {kind}: process {self.process}: no step has ended "
            f"for {silent:.0f} s after step {self.step} (limit {limit} s, "
            f"train.hang_seconds={self.hang_seconds}); the stacks are in {stacks}{self._behind()}",
            file=sys.stderr,
            flush=True,
        )
        if not self.alone:
            hosts.end(HUNG)

    def _behind(self) -> str:
        """The heartbeats of the processes that are the furthest behind, where there are others."""
        beats = heartbeats(self.folder)
        if self.alone or not beats:
            return ""
        least = min(beat["step"] for beat in beats)
        named = [
            f"{b['process']} ({b['host']}, pid {b['pid']})" for b in beats if b["step"] == least
        ]
        return (
            f"; at step {least}: process {', '.join(named[:4])}; run the same command for all again"
        )


def _dump(file: pathlib.Path | None) -> None:
    """The stacks of all threads, to a file or standard error."""
    with contextlib.ExitStack() as stack:
        to = sys.stderr if file is None else stack.enter_context(file.open("w"))
        faulthandler.dump_traceback(to, all_threads=True)


def heartbeats(folder: pathlib.Path) -> list[dict]:
    """What the processes of a run last told of themselves, in their order."""
    beats = []
    for file in folder.glob("heartbeat-*.json"):
        with contextlib.suppress(OSError, ValueError):
            beats.append(json.loads(file.read_text()))
    return sorted(beats, key=lambda beat: beat["process"])


def forget(folder: pathlib.Path) -> None:
    """Removes what an earlier start, perhaps of more processes, told of itself."""
    for file in folder.glob("heartbeat-*.json"):
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def beside(folder: pathlib.Path, hang_seconds: int) -> Iterator[Watch]:
    """A `Watch` for the block."""
    watch, over = Watch(folder, hang_seconds), threading.Event()
    period = min(PERIOD, hang_seconds / 4) if hang_seconds else PERIOD

    def keep() -> None:
        while True:
            watch.write()
            if over.wait(period):
                return watch.write()
            watch.look()

    thread = threading.Thread(target=keep, name="watch", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join(timeout=PERIOD)
