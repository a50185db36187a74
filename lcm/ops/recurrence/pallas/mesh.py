"""Recurrences of each device's own rows and heads, as XLA cannot partition kernels."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lcm.ops.attention.sharded import HEADS
from lcm.ops.placed import axes_in_use, axes_of_rows
from lcm.types import Array


def over_mesh(
    run: Callable[..., Any], cut: Sequence[int | None], cut_out: Any, *given: Array
) -> Any:
    """`run(*given)` in a `jax.shard_map` where a mesh is in use, over the axes that are free.

    Rows, axis 0 of all, are cut over `data` and `fsdp`. What heads have of their own is cut over
    `tensor` at the axes `cut` and `cut_out`; None is of all heads. Either is if it divides; what is
    not cut, each device has, and computes.
    """
    axes = axes_in_use()
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not axes or (not manual and math.prod(axes.values()) == 1):
        return run(*given)
    rows = axes_of_rows(axes, given[0].shape[0])
    count = cut_of(*(x.shape[at] for x, at in zip(given, cut, strict=True) if at is not None))

    def spec(axis: int | None) -> PartitionSpec:
        if axis is None or count == 1:
            return PartitionSpec(rows)
        return PartitionSpec(rows, *[None] * (axis - 1), HEADS)

    return jax.shard_map(
        run,
        in_specs=tuple(map(spec, cut)),
        out_specs=jax.tree.map(spec, cut_out),
        axis_names=set(axes),
        check_vma=False,  # kernels do not say over which axes their results vary
    )(*given)


def cut_of(*sizes: int) -> int:
    """Over how many devices axes of these sizes are cut together."""
    count = axes_in_use().get(HEADS, 1)
    return count if all(size % count == 0 for size in sizes) else 1
