"""What TPU chips can do at most, as published, and the time a program needs at least on one."""

from typing import NamedTuple

from lcm.errors import CompileError


class Chip(NamedTuple):
    """Peaks of one device, from the data sheets of cloud.google.com/tpu/docs (read 2026-11).

    flops: bfloat16 FLOP/s.
    bandwidth: bytes/s of its memory.
    memory: bytes.
    links: bytes/s to other chips, all links together.
    """

    flops: float
    bandwidth: float
    memory: int
    links: float


GIB = 2**30
# tpu7x has two devices on a chip, which share what the sheet gives for it.
CHIPS = {
    "v4": Chip(275e12, 1.2e12, 32 * GIB, 300e9),
    "v5e": Chip(197e12, 0.82e12, 16 * GIB, 200e9),
    "v5p": Chip(459e12, 2.77e12, 95 * GIB, 600e9),
    "v6e": Chip(918e12, 1.64e12, 32 * GIB, 448e9),
    "tpu7x": Chip(2307e12 / 2, 7.37e12 / 2, 96 * GIB, 1200e9 / 2),
}


def chip(topology: str) -> Chip:
    """The chip of a topology such as `v5p:4x4x4`.

    Raises:
        CompileError: for another generation.
    """
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise CompileError(
            f"topology {topology!r} is of no generation with known peaks: take {', '.join(CHIPS)}, "
            "then the chips along each axis, such as v5p:4x4x4"
        )
    return CHIPS[kind]


class Bound(NamedTuple):
    """Seconds that a step takes at least, by what it is waiting for."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def bottleneck(self) -> str:
        return self._fields[self.index(max(self))]


def bound(chip: Chip, flops: float, accessed: float, sent: float) -> Bound:
    """The roofline of one device: its FLOPs, bytes of memory and bytes of collectives."""
    return Bound(flops / chip.flops, accessed / chip.bandwidth, sent / chip.links)
