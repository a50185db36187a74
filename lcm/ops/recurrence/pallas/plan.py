"""What the kernels of recurrences know before tracing: whether they run, on what, in which grid."""

import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from lcm.ops.platform import platform
from lcm.ops.tpu import LANES
from lcm.types import Array

Ref = Any  # an array in the memory of a core
interpret = False  # run kernels as plain JAX, for tests on a machine without a TPU


def here() -> bool:
    """Whether programs of this moment can have kernels."""
    return interpret or platform() == "tpu"


def block(size: int, largest: int) -> int:
    """The width of equal blocks of at most `largest` that pad a size least: whole lanes, or all."""
    count = math.ceil(size / largest)
    return size if count == 1 else math.ceil(size / count / LANES) * LANES


def cost(flops: int, exponentials: int, *arrays: Array) -> pl.CostEstimate:
    """Work of a kernel that reads or writes each of the arrays once."""
    moved = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=exponentials)
