"""A signal to stop, and the step at which all processes of a run do so.

Processes do not take a step at the same instant, and one that stopped earlier than another would
leave it waiting in the next step. So the one that is told to stop says so in the store of
`lcm.parallel.hosts`; each then promises not to begin a step beyond the last that it has begun, and
all stop after the latest of these. Promises are made in a thread, as the loop may be waiting for a
process that has yet to hear of it. A step costs a lock; there is nothing to gather on the devices.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from lcm.errors import HostError
from lcm.parallel import hosts

EVERY = 0.5  # seconds between looks at the store, for up to a hundred processes
_KEY = "lcm/stop"


class Stop:
    """Says whether another step may begin."""

    def __init__(self, received: list[int], step: int | None = None):
        self.received = received
        self.begun = step  # the last step that this process has begun, None before `restored`
        self.promised: int | None = None  # none beyond this one begins, unless ...
        self.last: int | None = None  # ... the latest of all promises is later
        self.lost = False
        self.changed = threading.Condition()

    def restored(self, step: int) -> None:
        """Notes the step that the run goes on from: before it is known, nothing is promised."""
        self.begun = step

    def more(self) -> bool:
        """Begins a step, True, or says that the last one was begun.

        Raises:
            HostError: if process 0 is gone while the others wait for promises.
        """
        with self.changed:
            while self.begun == self.promised and self.last is None:
                if self.lost:
                    raise HostError("process 0 is gone: run the same command for all again")
                self.changed.wait()
            last = self.begun if self.received and not self.together else self.last
            if last is not None and self.begun >= last:
                return False
            self.begun += 1
            return True

    @property
    def together(self) -> bool:
        """Whether there are others to agree with."""
        return jax.process_count() > 1

    def look(self, store: Any) -> None:
        """Hears of signals to others, tells them of one to this, and takes the latest promise."""
        if self.begun is None:
            return
        told = dict(store.key_value_dir_get(_KEY))
        if self.promised is None and (self.received or told):
            with self.changed:
                self.promised = self.begun
            store.key_value_set(f"{_KEY}/{jax.process_index()}", str(self.promised))
        elif len(told) == jax.process_count():
            with self.changed:
                self.last = max(map(int, told.values()))
                self.changed.notify_all()


@contextmanager
def watched() -> Iterator[Stop]:
    """A `Stop` that listens to SIGTERM and Ctrl-C in any process of a run that is to begin."""
    with _signals() as received:
        stop = Stop(received)
        if not stop.together:
            yield stop
            return
        over = threading.Event()
        thread = threading.Thread(target=_listen, args=(stop, over), name="stop", daemon=True)
        thread.start()
        try:
            yield stop
        finally:
            over.set()


def _listen(stop: Stop, over: threading.Event) -> None:
    store, period = hosts.client(), EVERY * max(1, jax.process_count() / 100)
    while stop.last is None and not over.wait(period):
        try:
            stop.look(store)
        except Exception:  # process 0 is gone; a step under way finds that out by itself
            with stop.changed:
                stop.lost = True
                stop.changed.notify_all()
            return


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM or SIGINT arrives; a second one acts as it always did."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    try:
        before = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread, which alone may set handlers
        yield received
        return
    try:
        yield received
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
