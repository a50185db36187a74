"""Several processes as one run: how they find each other, and what they agree on.

Words between processes go through the store of JAX's coordination service, which process 0 holds:
they need no devices, and no program that the others might not run. With one process nothing here
costs or waits.
"""

import contextlib
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
from jax._src import distributed  # its client has no public name

from lcm.errors import ConfigError, HostError, UserError
from lcm.parallel import meeting, parent
from lcm.progress import Report, progress, silent

T = TypeVar("T")

AUTO = "auto"
WAIT = 300  # seconds that processes wait for one another, at the start and when they agree
_SILENT = 60  # seconds without a sign of life after which JAX takes a process for dead, at most
_LEAVE = 15  # seconds that a process that failed stays for the others, perhaps slow, to say it too

_turns = itertools.count()  # agreements so far: all processes make them in the same order


class Start(NamedTuple):
    """Where process 0 listens, how many processes there are, which this is; seconds to wait.

    With the coordinator `auto` JAX asks the machine (TPU metadata, Slurm, Open MPI).
    """

    coordinator: str
    processes: int | None
    process: int | None
    wait: int


def asked(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    wait: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Start | None:
    """What flags ask for, or else LCM_COORDINATOR, LCM_PROCESSES, LCM_PROCESS and LCM_WAIT.

    None is a run of one process.

    Raises:
        ConfigError: if only a part is given, or a value cannot be.
    """
    coordinator = coordinator or environment.get("LCM_COORDINATOR", "")
    processes = _number("processes", processes, environment)
    process = _number("process", process, environment)
    wait = _number("wait", wait, environment)
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    absent = [name for name, value in given.items() if value in (None, "")]
    if len(absent) == 3:
        return None
    if wait is not None and wait < 1:
        raise ConfigError(f"--wait={wait} must be at least 1 second")
    start = Start(coordinator, processes, process, WAIT if wait is None else wait)
    if coordinator == AUTO:
        if len(absent) != 2:
            raise ConfigError(
                "--coordinator=auto asks the machine for --processes and --process: leave them out"
            )
        return start
    if absent:
        raise ConfigError(
            f"--{absent[0]} (LCM_{absent[0].upper()}) is missing: several processes need "
            "--coordinator=HOST:PORT, --processes=N and --process=I, or --coordinator=auto"
        )
    _check(start)
    return start


def _number(name: str, flag: int | None, environment: Mapping[str, str]) -> int | None:
    text = environment.get(f"LCM_{name.upper()}", "")
    if flag is not None or not text:
        return flag
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"LCM_{name.upper()}={text!r} is not a whole number") from error


def _check(start: Start) -> None:
    host, _, port = start.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"--coordinator={start.coordinator} is not HOST:PORT: name the machine of process 0 "
            "and a free port there, such as 10.0.0.1:8476"
        )
    if start.processes < 1:
        raise ConfigError(f"--processes={start.processes} must be at least 1")
    if not 0 <= start.process < start.processes:
        raise ConfigError(
            f"--process={start.process} is not one of the {start.processes} of --processes: "
            f"they are numbered from 0 to {start.processes - 1}"
        )


@contextlib.contextmanager
def running(start: Start | None) -> Iterator[None]:
    """Joins the processes of a run; the block is what they do together.

    A process that fails leaves at once, with its message and status: the way out that Python takes
    waits for all the others, which may wait for this one. The block runs in a child process, see
    `lcm.parallel.parent`, and what follows the block in neither if it fails.
    """
    if start is None:
        yield
        return
    parent.stand_by("this process" if start.process is None else f"process {start.process}")
    try:
        _join(start)
        yield
    except BaseException as error:
        _leave(error)
    with contextlib.suppress(Exception):  # the work is done, whoever is still there
        jax.distributed.shutdown()


def _join(start: Start) -> None:
    if start.coordinator != AUTO:
        meeting.meet(*start)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself; lcm.training.stopping agrees on the step to stop at.
    jax.config.update("jax_enable_preemption_service", False)
    address = None if start.coordinator == AUTO else start.coordinator
    try:
        jax.distributed.initialize(
            address,
            start.processes,
            start.process,
            initialization_timeout=start.wait,
            heartbeat_timeout_seconds=min(start.wait, _SILENT),
            shutdown_timeout_seconds=min(start.wait, _SILENT),
        )
    except (ValueError, RuntimeError, OSError) as error:
        kind = ConfigError if start.coordinator == AUTO else HostError
        raise kind(_not_joined(start, error)) from error
    if not is_first():  # one speaks for all
        logging.getLogger("lcm").setLevel(logging.ERROR)


def _not_joined(start: Start, error: Exception) -> str:
    line = _first_line(error)
    if start.coordinator == AUTO:
        return (
            f"--coordinator=auto finds no cluster here ({line}): give --coordinator=HOST:PORT, "
            "--processes=N and --process=I"
        )
    return (
        f"process {start.process} of {start.processes} did not meet the others at "
        f"{start.coordinator} within {start.wait} s ({line}): start all of them, with the same "
        "--coordinator and --processes and a --process each"
    )


@contextlib.contextmanager
def losses_said() -> Iterator[None]:
    """Says in one line that another process is gone, of which a step or a save fails somehow.

    Raises:
        HostError: for what only that can mean.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or not (cause := _of_network(error)):
            raise
        raise HostError(
            f"process {jax.process_index()} of {jax.process_count()} lost another "
            f"({_first_line(cause)}): look at the error of that one, and run the same command for "
            "all again: training resumes from the last checkpoint"
        ) from error


def _of_network(error: BaseException | None) -> BaseException | None:
    """The error, or what caused it, that comes from talking to other processes."""
    signs = ("gloo", "coordination", "unavailable", "deadline_exceeded", "connection", "barrier")
    while error is not None:
        if isinstance(error, HostError):
            return None  # said already
        if not isinstance(error, UserError) and any(sign in str(error).lower() for sign in signs):
            return error
        error = error.__cause__
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _leave(error: BaseException) -> NoReturn:
    """Ends this process now, with the message and status that the command line would give."""
    if isinstance(error, UserError):
        print(f"lcm: error: {error}", file=sys.stderr)
        status = error.status
    elif isinstance(error, KeyboardInterrupt):
        status = 130
    else:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    sys.stderr.flush()
    # JAX ends the others when process 0 goes: where all know the same error, all may say it.
    with contextlib.suppress(Exception):
        distributed.global_state.client.wait_at_barrier("lcm/leave", _LEAVE * 1000)
    end(status)


def end(status: int) -> NoReturn:
    """Ends this process whatever its other threads wait for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def client() -> Any:
    """JAX's connection to process 0, for runs of several processes.

    Raises:
        ConfigError: if the devices here are those of several hosts, and none has been told so.
    """
    if distributed.global_state.client is None:
        raise ConfigError(
            f"the {jax.device_count()} devices here belong to {jax.process_count()} hosts: start "
            "the same command on each of them with --coordinator=auto"
        )
    return distributed.global_state.client


def is_first() -> bool:
    """Whether this is process 0, which alone writes what there is one of."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order; all must call it, in the same order of calls.

    Raises:
        HostError: if one does not within five minutes.
    """
    count, here = jax.process_count(), jax.process_index()
    if count == 1:
        return [text]
    there = client()
    turn = f"lcm/agree/{next(_turns)}"
    found = []
    try:
        there.key_value_set(f"{turn}/{here}", f".{text}")  # the store takes no empty text
        for process in range(count):
            found.append(there.blocking_key_value_get(f"{turn}/{process}", WAIT * 1000)[1:])
    except Exception as error:
        raise HostError(
            f"process {len(found)} of {count} did not answer within {WAIT} s: look at its own "
            "error, and run the same command for all again"
        ) from error
    return found


def by_all(act: Callable[[], T]) -> T:
    """Does something in every process; the error of one is that of all.

    Raises:
        UserError: what `act` raised here, or else in the first process in which it did.
        RuntimeError: if what was raised elsewhere is no error of the user.
    """
    value = failed = None
    try:
        value = act()
    except Exception as error:
        if jax.process_count() == 1:
            raise
        failed = error
    outcomes = gather("" if failed is None else f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    for process, outcome in enumerate(outcomes):
        if outcome:
            kind, _, message = outcome.partition(": ")
            known = {each.__name__: each for each in UserError.__subclasses__()}
            raise known.get(kind, RuntimeError)(message or f"process {process}: {kind}")
    return value


def by_first(act: Callable[[], Any]) -> Any:
    """Does something in process 0 alone, the others waiting; its error is that of all."""
    return by_all(lambda: act() if is_first() else None)


def shown(title: str) -> contextlib.AbstractContextManager[Report]:
    """Progress, of which process 0 tells."""
    return progress(title) if is_first() else contextlib.nullcontext(silent)


def check_same(what: str, text: str) -> None:
    """Refuses processes that were given different things.

    Raises:
        ConfigError: in all of them, naming the first that differs.
    """
    for process, other in enumerate(texts := gather(text)):
        if other != texts[0]:
            raise ConfigError(
                f"process {process} has another {what} than process 0: start all with the same "
                "files and flags"
            )
