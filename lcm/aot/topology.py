"""TPU slices by name, described by libtpu without the hardware."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from lcm.errors import CompileError

EXAMPLES = "v4:2x2x1, v5e:2x2, v5e:16x16, v5p:2x2x1, v5p:8x8x16, v6e:2x2, v6e:16x16, tpu7x:2x2x1"
_NAME = r"\w+:[1-9]\d*(x[1-9]\d*){1,2}"


def mesh(topology: str, shape: Sequence[int] = (1,), names: Sequence[str] = ("device",)) -> Mesh:
    """A mesh over the first devices of a TPU slice.

    Args:
        topology: generation and chips, such as "v5e:4x4". A single chip is the first of a slice.
        shape: devices along each axis.
        names: of the axes.

    Raises:
        CompileError: if libtpu is missing, or has no such topology, or it has too few devices.
    """
    found = devices(topology)
    count = math.prod(shape)
    if count > len(found):
        raise CompileError(
            f"a mesh of {'x'.join(map(str, shape))} needs {count} devices, topology {topology} has "
            f"{len(found)}: take a larger one"
        )
    grid = np.array(found[:count]).reshape(shape)
    return Mesh(grid, tuple(names), axis_types=(AxisType.Auto,) * grid.ndim)


def wrapped(topology: str) -> tuple[bool, bool, bool]:
    """Which axes of a slice are rings, its last chip being a neighbour of the first.

    On three axes (v4, v5p, tpu7x) cubes of 4 x 4 x 4 are joined by switches, so a slice of whole
    cubes is a ring along each, and a smaller one along none (docs.cloud.google.com/tpu/docs/v5p);
    on two (v5e, v6e) the pod of 16 x 16 chips is a torus (docs.cloud.google.com/tpu/docs/v5e).

    libtpu assumes none if it is not told, and a gather over a line of chips is an all-reduce of
    arrays that are zero elsewhere, of twice the traffic.
    """
    chips = [int(size) for size in topology.partition(":")[2].split("x")]
    if len(chips) == 2:
        return chips[0] == 16, chips[1] == 16, False
    return (all(size % 4 == 0 for size in chips),) * 3


def devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU slice.

    Raises:
        CompileError: for what is no name of one, if libtpu is missing, or has no such topology.
    """
    if not re.fullmatch(_NAME, topology):  # libtpu ends the process of some, such as v5e:0x1
        raise CompileError(
            f"topology {topology!r} is no generation with a number of chips along each of two or "
            f"three axes: take one such as {EXAMPLES}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise CompileError(
            "compiling for a TPU needs libtpu, which is not installed: pip install 'jax[tpu]'"
        )
    # Nothing is asked of a metadata server, and compilations may run beside each other.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, wrap=wrapped(topology)
        )
        return described.devices
    except Exception as error:  # of several kinds, all from libtpu
        line = str(error).splitlines()[0]
        raise CompileError(
            f"topology {topology!r} is none that libtpu knows ({line}): take one such as {EXAMPLES}"
        ) from error
