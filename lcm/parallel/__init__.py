"""The mesh and where things lie on it."""

from lcm.parallel import hosts
from lcm.parallel.context import arranged, order
from lcm.parallel.mesh import AXES, BATCH, batch_sharding, make, make_reading, of, put, sizes
from lcm.parallel.rules import RULES, path, shardings

__all__ = [
    "AXES",
    "BATCH",
    "RULES",
    "arranged",
    "batch_sharding",
    "hosts",
    "make",
    "make_reading",
    "of",
    "order",
    "path",
    "put",
    "shardings",
    "sizes",
]
