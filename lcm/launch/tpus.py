"""TPU slices by the names under which the cloud rents them, such as v5p-128."""

import difflib
import math
from typing import NamedTuple

from lcm.errors import UserError


class Slice(NamedTuple):
    """A slice that can be rented.

    type: as gcloud and xpk take it, such as `v5litepod-16`.
    chips: devices that jax finds, one a chip.
    topology: the name under which libtpu, and so `lcm compile`, knows it.
    runtime: the software of its machines.
    """

    type: str
    chips: int
    topology: str
    runtime: str


class _Generation(NamedTuple):
    """How slices of one kind are named: by their cores, of which a chip has one or two.

    Sources: cloud.google.com/tpu/docs/{v4,v5p,v5e,v6e} and /runtimes, and the system
    characteristics in xpk's repository, AI-Hypercomputer/xpk (read 2026-11). Of sizes of v4 and
    v5p with several topologies, that which is nearest to a cube.
    """

    prefix: str
    cores: int
    runtime: str
    topologies: str


_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_CUBES = (
    "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x4x12 4x8x8 4x8x12 8x8x8 8x8x12 8x8x16 8x12x16 8x16x16"
)
_GENERATIONS = {
    "v4": _Generation("v4", 2, "tpu-ubuntu2204-base", _CUBES),
    "v5e": _Generation("v5litepod", 1, "v2-alpha-tpuv5-lite", _FLAT),
    "v5p": _Generation("v5p", 2, "v2-alpha-tpuv5", f"{_CUBES} 12x16x16 16x16x16 16x16x20 16x16x24"),
    "v6e": _Generation("v6e", 1, "v2-alpha-tpuv6e", _FLAT),
}
# v5e goes by two names.
_ALIASES = {"v5e": "v5litepod"}


def slices() -> dict[str, Slice]:
    """All slices by type, those of a generation together and in the order of their size."""
    found = {}
    for name, generation in _GENERATIONS.items():
        for shape in generation.topologies.split():
            chips = math.prod(map(int, shape.split("x")))
            kind = f"{generation.prefix}-{generation.cores * chips}"
            found[kind] = Slice(kind, chips, f"{name}:{shape}", generation.runtime)
    return found


def find(kind: str) -> Slice:
    """The slice of a type.

    v4 and v5p are counted in cores, two a chip: v5p-128 has 64 chips. v5e and v6e in chips.

    Raises:
        UserError: for a type that cannot be rented, naming those nearest to it.
    """
    known = slices()
    prefix, _, size = kind.partition("-")
    kind_there = f"{_ALIASES.get(prefix, prefix)}-{size}"
    if kind_there in known:
        return known[kind_there]
    alike = [each for each in known if each.startswith(kind_there.partition("-")[0] + "-")]
    if alike and size.isdigit():
        alike.sort(key=lambda each: abs(int(each.partition("-")[2]) - int(size)))
    near = alike[:3] or difflib.get_close_matches(kind, known, n=3, cutoff=0.3) or list(known)[:3]
    raise UserError(
        f"--tpu={kind} is no slice that can be rented: take one such as {', '.join(near)} (v4 and "
        "v5p count cores, two a chip; v5e, also v5litepod, and v6e count chips)"
    )
