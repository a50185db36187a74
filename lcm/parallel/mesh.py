"""The device mesh, and what must divide by its axes."""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lcm.errors import ConfigError
from lcm.parallel import context
from lcm.types import Batch

AXES = ("data", "fsdp", "context", "tensor")
# Rows over data and fsdp, the sequence over context: tokens, targets, positions, weights alike.
BATCH = PartitionSpec(("data", "fsdp"), "context")


def make(cfg: Any, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a config over all devices; the one axis given as -1 takes those left over.

    Raises:
        ConfigError: if the axes do not multiply to the number of devices, or do not divide the
            sizes that they shard.
    """
    devices = jax.devices() if devices is None else devices
    return _over(devices, sizes(cfg, len(devices)))


def make_reading(cfg: Any) -> Mesh:
    """The mesh of a config for a model that is read and not trained, whatever the training batch.

    Raises:
        ConfigError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices()
    return _over(devices, _counted(cfg, len(devices)))


def of(params: Any) -> Mesh | None:
    """The mesh that parameters lie on; None for those of one device."""
    where = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return where.mesh if isinstance(where, NamedSharding) else None


def sizes(cfg: Any, count: int) -> dict[str, int]:
    """Devices along each axis of a config's mesh over `count` of them, in the order of `AXES`.

    Raises:
        ConfigError: as `make`.
    """
    sizes = _counted(cfg, count)
    _check_divides(cfg, sizes)
    context.check(cfg, sizes)
    return sizes


def _counted(cfg: Any, count: int) -> dict[str, int]:
    sizes = {axis: cfg.mesh[axis] for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"mesh axes are positive, at most one is -1; these are {_written(sizes)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if math.prod(sizes.values()) != count:
        way = (
            f"{free[0]} is what is left, and the others, {fixed} together, must divide {count}"
            if free
            else f"the axes must multiply to {count}; set one of them to -1"
        )
        raise ConfigError(f"mesh {_written(sizes)} does not cover {count} devices: {way}")
    return sizes


def _over(devices: list[jax.Device], sizes: dict[str, int]) -> Mesh:
    grid = _grid(devices, tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """The devices so that neighbours along an axis are neighbours on the chips' network.

    Gathers over a ring that jumps about are several times as dear.
    """
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except (NotImplementedError, ValueError, AssertionError):  # no such axes on that network
        return np.asarray(devices).reshape(shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How every array of a batch lies on the mesh."""
    return NamedSharding(mesh, BATCH)


def put(batch: Batch, mesh: Mesh) -> Batch:
    """A whole batch, which every process has, on the mesh: each puts the parts of its devices."""
    sharding = batch_sharding(mesh)

    def place(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(place, batch)


def _check_divides(cfg: Any, sizes: dict[str, int]) -> None:
    rows, accumulate = cfg.train.batch, cfg.train.accumulate
    if accumulate < 1 or rows % accumulate:
        raise ConfigError(
            f"train.batch={rows} is not a multiple of train.accumulate={accumulate}: "
            f"take a batch of {max(1, accumulate) * -(-rows // max(1, accumulate))}"
        )
    shards = sizes["data"] * sizes["fsdp"]
    if rows % (shards * accumulate):
        step = shards * accumulate
        raise ConfigError(
            f"train.batch={rows} is not divisible by {step} (mesh.data {sizes['data']} x mesh.fsdp "
            f"{sizes['fsdp']} x train.accumulate {accumulate}): take {step * -(-rows // step)}"
        )
    if cfg.data.length % sizes["context"]:
        raise ConfigError(
            f"data.length={cfg.data.length} is not divisible by mesh.context={sizes['context']}: "
            f"take a multiple of {sizes['context']}"
        )


def _written(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())
