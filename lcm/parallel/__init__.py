"""The mesh and where things lie on it."""

from lcm.parallel.mesh import AXES, batch_sharding, make, put
from lcm.parallel.rules import RULES, path, shardings

__all__ = ["AXES", "RULES", "batch_sharding", "make", "path", "put", "shardings"]
