"""The schedules of Pallas kernels: how many cycles a tile takes, and what its registers spill.

libtpu writes the final program of every kernel as very long instruction words, one *bundle* a
cycle, with the units that each keeps busy. All branches are counted once and loops are not
multiplied, so the figures compare kernels of like structure; they are no times.
"""

import inspect
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from lcm.errors import CompileError

_UTILISATION = "-final_hlo-static-per-bundle-utilization.txt"
_BUNDLES = "-final_bundles.txt"


class Schedule(NamedTuple):
    """One kernel's bundles and the slots that its instructions take in them.

    mxu, valu, xlu, eup, loads, stores: issue slots of the matrix, vector, cross-lane and
        transcendental units and of vector memory; fills and spills are loads and stores of
        registers that did not suffice.
    mxu_use: share of all matrix slots that is taken.
    matmuls: matrix instructions.
    """

    bundles: int
    mxu: int
    mxu_use: float
    valu: int
    xlu: int
    eup: int
    loads: int
    stores: int
    fills: int
    spills: int
    matmuls: int


def schedules(
    build: Callable[..., tuple], *given: Any, topology: str = "v5e:2x2"
) -> dict[str, Schedule]:
    """Schedules of the kernels of `fn(*args)` for `fn, args = build(*given)`, by kernel name.

    libtpu reads its flags once a process, so the compilation is in a process of its own: `build`
    must be a function at the top of a file, and `given` be picklable.

    Raises:
        CompileError: if `build` cannot be found from another process, or does not compile.
    """
    if "." in build.__qualname__:
        raise CompileError(
            f"{build.__qualname__} is not at the top of a file: another process must find it there"
        )
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": flags,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        task = inspect.getsourcefile(build), build.__qualname__, given, topology
        ran = subprocess.run(
            [sys.executable, "-m", "lcm.aot.child"],
            input=pickle.dumps(task),
            env=environment,
            capture_output=True,
        )
        if ran.returncode:
            raise CompileError(
                f"{build.__qualname__} does not compile for {topology}: "
                + ran.stderr.decode(errors="replace")[-2000:]
            )
        kernels = json.loads(ran.stdout.splitlines()[-1])
        found = _read(pathlib.Path(folder))
    return {name: found[name] for name in kernels if name in found}


def _read(folder: pathlib.Path) -> dict[str, Schedule]:
    """Schedules of all that was compiled, XLA's own fusions too."""
    found = {}
    for path in sorted(folder.glob(f"*{_UTILISATION}")):
        stamp, name, _ = re.fullmatch(r"(\d+)-(.*)-(\d+)", path.name[: -len(_UTILISATION)]).groups()
        programs = sorted(folder.glob(f"{stamp}-{name}-*{_BUNDLES}"))
        found[name] = _schedule(path.read_text(), programs[0].read_text() if programs else "")
    return found


def _schedule(utilisation: str, program: str) -> Schedule:
    """From a table with the units' names, their slots a bundle, and a line for each bundle."""
    lines = utilisation.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("MXU,"))
    units = [unit.strip() for unit in lines[head].split(",")]
    capacity = dict(zip(units, map(int, lines[head + 1].split()), strict=False))
    rows = [list(map(int, line.split())) for line in lines[head + 2 :] if line[:1].isdigit()]
    used = {unit: sum(row[i] for row in rows) for i, unit in enumerate(units) if unit}
    return Schedule(
        bundles=len(rows),
        mxu=used["MXU"],
        mxu_use=used["MXU"] / max(1, capacity["MXU"] * len(rows)),
        valu=used["VALU"],
        xlu=used["XLU"],
        eup=used["EUP"],
        loads=used["VLOAD"],
        stores=used["VSTORE"],
        fills=used["VLOAD:FILL"],
        spills=used["VSTORE:SPILL"],
        matmuls=len(re.findall(r"\bvmatmul", program)),
    )
