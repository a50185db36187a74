"""Where each parameter lies on the mesh: rules by path, outside the model."""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcm.errors import ConfigError

_CHANNELS = PartitionSpec(None, "tensor")

# The first rule whose pattern is found in a path decides. Layers have a leading axis of their own.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"carried/(mean|std)/", PartitionSpec()),
    (r"carried/position_B$", PartitionSpec(("data", "fsdp"))),
    (r"carried/layers/", PartitionSpec(None, ("data", "fsdp"))),  # states of rows, by layer
    (r"embedding/table$", PartitionSpec("tensor", "fsdp")),
    (r"head/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"layers/\w+/mixer/(q|k|v|r|g|gate)$", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers/\w+/mixer/out$", PartitionSpec(None, "tensor", "fsdp")),
    (r"layers/\w+/mlp/(shared/)?(gate|up)$", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers/\w+/mlp/(shared/)?down$", PartitionSpec(None, "tensor", "fsdp")),
    (r"layers/\w+/mlp/expert_(gate|up)$", PartitionSpec(None, None, "fsdp", "tensor")),
    (r"layers/\w+/mlp/expert_down$", PartitionSpec(None, None, "tensor", "fsdp")),
    (r"layers/\w+/mlp/(router|shared_gate)$", PartitionSpec(None, "fsdp")),
    (r"layers/\w+/mixer/(q|k|v)_bias$", PartitionSpec(None, "tensor")),
    (r"layers/\w+/mlp/(gate|up)_bias$", PartitionSpec(None, "tensor")),
    (r"layers/\w+/mixer/(x|y|z)$", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers/\w+/mixer/(b|bc|c|dt|beta|a|i|f|trap|angle)$", PartitionSpec(None, "fsdp")),
    (r"layers/\w+/mixer/(decay|gate|rate|value|mix|[qkv]|mlp)_down$", PartitionSpec(None, "fsdp")),
    (r"layers/\w+/mixer/(latent|shared)$", PartitionSpec(None, "fsdp")),  # of all heads
    (r"layers/\w+/mixer/(decay|gate|rate|value|[qkv]|up)_up$", PartitionSpec(None, None, "tensor")),
    (r"layers/\w+/mixer/linear$", PartitionSpec(None, "fsdp", "tensor")),
    (r"blocks/\w+/(q|k|v|mlp/gate|mlp/up)$", PartitionSpec("fsdp", "tensor")),  # used by layers
    (r"blocks/\w+/(out|mlp/down)$", PartitionSpec("tensor", "fsdp")),
    (r"blocks/\w+/(q|k|v|mlp/gate|mlp/up)_bias$", PartitionSpec("tensor")),
    (r"layers/\w+/mixer/(update|forget|admit|candidate)$", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers/\w+/mixer/(gates|recurrent)$", PartitionSpec(None, "fsdp")),  # four to a channel
    (r"layers/\w+/mixer/head_(gates|recurrent)$", PartitionSpec(None, None, "tensor")),
    (r"layers/\w+/mixer/(head_)?gates_bias$", PartitionSpec()),
    (r"layers/\w+/mixer/(mix_\w+|bonus|erase_scale|key_rate|[bc]_bias|rank_\w+)$", PartitionSpec()),
    (r"layers/\w+/mixer/(B|C)$", PartitionSpec(None, "fsdp")),
    (r"layers/\w+/mixer/glu$", PartitionSpec(None, "tensor", "fsdp")),
    (r"layers/\w+/mixer/\w+_(log|re|im)$", PartitionSpec()),
    (r"layers/\w+/mixer/dt_down$", PartitionSpec(None, "tensor")),
    (r"layers/\w+/mixer/dt_up$", PartitionSpec(None, None, "tensor")),
    (r"layers/\w+/mixer/(recurrence|input)$", PartitionSpec(None, "tensor")),  # by block
    (r"layers/\w+/mixer/(conv|conv_[xqkv])$", PartitionSpec(None, None, None, "tensor")),
    (r"layers/\w+/mixer/(conv_x|conv|recurrence|input|x|y)_bias$", _CHANNELS),
    (r"layers/\w+/mixer/a_param$", _CHANNELS),
    (
        r"layers/\w+/mixer/(conv_bc|conv_bc_bias|(dt|i|f|decay|rate|value)_bias|A_log|D|clock)$",
        PartitionSpec(),
    ),
    (r"opt_state/.+/ns_coeffs$", PartitionSpec()),  # of Muon
    (r"(norm/(scale|bias)|(out|down|choice)_bias|positions/.+)$", PartitionSpec()),
)


def path(keys: tuple[Any, ...], separator: str = "/") -> str:
    """A tree path as text, such as `layers/0/mixer/q`; safetensors files join with a dot."""
    return jax.tree_util.keystr(keys, simple=True, separator=separator)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for each leaf of a tree of parameters, or of anything that mirrors them.

    Optimiser moments and averages carry the path of their parameter at the end of their own, so
    one set of rules serves the whole train state. Scalars are replicated.

    Raises:
        ConfigError: if no rule fits a path, or an axis of the mesh does not divide a size.
    """
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: NamedSharding(mesh, _spec(path(keys), leaf.shape, mesh)), tree
    )


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if not shape:
        return PartitionSpec()
    for pattern, spec in RULES:
        if re.search(pattern, name):
            spec = _spread(spec, mesh)
            _check(name, shape, spec, mesh)
            return spec
    raise ConfigError(
        f"no sharding rule for parameter {name} {shape}: add one to lcm.parallel.RULES"
    )


def _spread(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """What is cut over fsdp is cut over the devices of a sequence, too: each needs a share only."""
    if mesh.shape["context"] == 1:
        return spec
    return PartitionSpec(*(("fsdp", "context") if axis == "fsdp" else axis for axis in spec))


def _check(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    for axis, (size, mesh_axis) in enumerate(zip(shape, spec, strict=False)):
        axes = mesh_axis if isinstance(mesh_axis, tuple) else (mesh_axis,) * (mesh_axis is not None)
        if size % math.prod(mesh.shape[each] for each in axes):
            sizes = " x ".join(f"mesh.{each}={mesh.shape[each]}" for each in axes)
            raise ConfigError(
                f"axis {axis} of {name} {shape} is not divisible by {sizes}: change that size or "
                "the mesh"
            )
