"""A parent that outlives a process of many, to say what became of it.

When process 0 goes, or a process falls silent, JAX ends the others from within, by an abort that
Python cannot catch: with pages of stacks and no status that means anything. The parent has the last
word, in one line and with a status that a launcher can act on.
"""

import ctypes
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

from lcm.errors import HostError

_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def stand_by(name: str) -> None:
    """Goes on in a child, which is ended if this process is; this process never returns.

    SIGTERM and Ctrl-C are passed on to the child. Its status becomes that of this process; an abort
    becomes that of a `HostError`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # JAX warns of forks, as its threads would not be in the child: there are none yet.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child:
        _wait(name, child)
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on once
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)


def _wait(name: str, child: int) -> NoReturn:
    def pass_on(number: int, frame: Any) -> None:
        os.kill(child, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGABRT:
        print(
            f"lcm: error: {name} was ended by JAX, as process 0 is gone or another fell silent: "
            "look at the error of that one, and run the same command for all again: training "
            "resumes from the last checkpoint",
            file=sys.stderr,
        )
        status = HostError.status
    elif status < 0:
        print(f"lcm: error: {name} was ended by signal {-status}", file=sys.stderr)
        status = 128 - status
    sys.stderr.flush()
    os._exit(status)
