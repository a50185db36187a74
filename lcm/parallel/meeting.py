"""Processes meet before JAX starts: who is missing, or was told something else, is said in a line.

JAX itself ends a process whose others do not come, by an abort that Python cannot catch. Process 0
listens at the coordinator's address; the others tell it who they are, and hear whether all came.
"""

import contextlib
import socket
import time

from lcm.errors import ConfigError, HostError

_CALL = b"lcm "
_LONGEST = 500  # bytes of what is said either way
_LATE = 2  # seconds that an answer may take


def meet(coordinator: str, processes: int, process: int, wait: int) -> None:
    """Returns when all processes of a run are there, at `host:port` of process 0.

    Raises:
        HostError: if one is not within `wait` seconds, or the port cannot be used.
        ConfigError: in all that are there, if their numbers do not agree.
    """
    host, port = coordinator.rsplit(":", 1)
    end = time.monotonic() + wait
    if process:
        return _call((host.strip("[]"), int(port)), coordinator, processes, process, end, wait)
    try:
        listener = socket.create_server(("", int(port)), backlog=processes)
    except OSError as error:
        raise HostError(
            f"port {port} of --coordinator={coordinator} cannot be used ({error.strerror}): "
            "choose another for all processes"
        ) from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(listener)
        callers: list[socket.socket] = []
        try:
            missing = _listen(listener, stack, callers, processes, end)
            problem = missing and HostError(
                f"process {', '.join(map(str, missing[:8]))} of {processes} did not come to "
                f"{coordinator} within {wait} s: start all of them with the same --coordinator"
            )
        except ConfigError as error:
            problem = error
        listener.close()  # before they are told: the port is JAX's from then on
        for caller in callers:
            with contextlib.suppress(OSError):
                caller.sendall(
                    (f"{type(problem).__name__}:{problem}" if problem else "ok").encode()
                )
    if problem:
        raise problem


def _listen(
    listener: socket.socket,
    stack: contextlib.ExitStack,
    callers: list[socket.socket],
    processes: int,
    end: float,
) -> list[int]:
    """Takes calls until all are there or time is over; the processes that are missing.

    Raises:
        ConfigError: if one has another number of processes, or the number of one that is there.
    """
    missing = list(range(1, processes))
    while missing and (left := end - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            caller = stack.enter_context(listener.accept()[0])
            caller.settimeout(2)
            said = caller.recv(_LONGEST)
        except OSError:  # time is over, or the caller went away
            continue
        if not said.startswith(_CALL):
            continue  # something else, that looks at ports
        callers.append(caller)
        number, count = map(int, said.removeprefix(_CALL).split())
        if count != processes:
            raise ConfigError(
                f"--processes={count} of process {number} is {processes} for process 0: give all "
                "the same"
            )
        if number not in missing:
            raise ConfigError(
                f"--process={number} was given to two processes: give each its own, from 0 to "
                f"{processes - 1}"
            )
        missing.remove(number)
    return missing


def _call(
    address: tuple[str, int], coordinator: str, processes: int, process: int, end: float, wait: int
) -> None:
    answer = failed = None
    while answer is None and time.monotonic() < end:
        try:
            with socket.create_connection(address, timeout=2) as call:
                call.sendall(_CALL + f"{process} {processes}".encode())
                call.settimeout(wait + _LATE)  # who listens says why within its own wait
                answer = call.recv(_LONGEST).decode() or None
        except OSError as error:
            failed = error
        if answer is None:
            time.sleep(0.2)
    if answer is None:
        why = getattr(failed, "strerror", None) or failed or "it hung up"
        raise HostError(
            f"--coordinator={coordinator} did not answer within {wait} s ({why}): is process 0 "
            "running there, and the port open?"
        )
    kind, _, message = answer.partition(":")
    if kind != "ok":
        raise (ConfigError if kind == ConfigError.__name__ else HostError)(message)
