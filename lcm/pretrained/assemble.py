"""From a source to a config and parameters, each built in its place."""

import math
import re
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from ml_collections import ConfigDict

from lcm import config, models, parallel
from lcm.errors import CheckpointError, ConfigError
from lcm.pretrained.families import family_of
from lcm.pretrained.families.base import Family, check_foreign, check_sizes
from lcm.pretrained.layout import Leaf, layout, tensor_shapes
from lcm.pretrained.source import Source

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ALIGNED = 64  # bytes; a CPU takes buffers that begin at a multiple as they are, without a copy
# What stays float32: scales near 1, rates, which count once for each token, and what choices among
# experts hang on.
EXACT = ("norm/scale", "/A_log", "/a_param", "/dt_bias", "/choice_bias")
Span = tuple[tuple[int, int], ...]


def assemble(
    source: Source, *, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[ConfigDict, Any]:
    """The config and the parameters of a pretrained model.

    Tensors are read one at a time into their places in the stacked parameters: beside those, no
    more than one tensor is in memory. With a mesh each device gets its shards alone.

    dtype: of the parameters, float32 or bfloat16; scales of norms stay float32, since those of
        Gemma are near 1, where bfloat16 has steps of 1/128, and so do rates of recurrences.

    Raises:
        ConfigError: for a model that the decoder is not.
        CheckpointError: for tensors that are missing, of another shape, or unknown.
    """
    family = family_of(source.config)
    source = family.view(source)
    cfg = read_config(family, source.config)
    leaves = layout(family, models.spec(cfg))
    names = _checked(family, source, leaves, cfg.model.tied)
    dtypes = {at: parameter_dtype(at, dtype) for at in leaves}
    places = _places({at: leaf.shape for at, leaf in leaves.items()}, mesh)
    params = {
        at: _placed(source, names, leaf, places[at], dtypes[at]) for at, leaf in leaves.items()
    }
    return cfg, _tree(params)


def parameter_dtype(path: str, dtype: str) -> np.dtype:
    """What a parameter is kept in where `dtype` is asked for.

    Raises:
        ConfigError: for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown: choose from {', '.join(DTYPES)}")
    return DTYPES["float32" if path.endswith(EXACT) else dtype]


def read_config(family: Family, hf: dict[str, Any]) -> ConfigDict:
    """The config of a `config.json`: `lcm.config.base()` with the model and its trained length.

    Raises:
        ConfigError: for what the decoder does not have.
    """
    check_foreign(hf, family.has)
    plain = family.plain(hf)
    check_foreign(plain, family.has)
    check_sizes(plain)
    cfg = config.base()
    for key, value in family.read(plain).items():
        if key in ("positions", "kinds"):
            with cfg.model.unlocked():
                cfg.model[key] = ConfigDict(value)
        else:
            cfg.model[key] = type(cfg.model[key])(value)
    cfg.data.length = _trained_length(plain)
    cfg.name = hf.get("_name_or_path") or hf["model_type"]
    return cfg


def _trained_length(hf: dict[str, Any]) -> int:
    """The context a model was trained to read, by the names that families have for it."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length", "context_length")
    names += ("model_max_length",)
    found = [hf[name] for name in names if hf.get(name)]
    if not found:
        raise ConfigError(f"the config has none of {', '.join(names)}: add the trained context")
    return found[0]


def _tree(leaves: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts from paths."""
    tree: dict[str, Any] = {}
    for at, leaf in leaves.items():
        *parents, last = at.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _places(shapes: dict[str, tuple[int, ...]], mesh: Mesh | None) -> dict[str, Sharding]:
    """A sharding by path: by the rules of lcm.parallel, or one device for all."""
    if mesh is None:
        return dict.fromkeys(shapes, SingleDeviceSharding(jax.local_devices()[0]))
    tree = _tree({at: jax.ShapeDtypeStruct(shape, "float32") for at, shape in shapes.items()})
    found = jax.tree_util.tree_leaves_with_path(parallel.shardings(tree, mesh))
    return {parallel.path(keys): place for keys, place in found}


def _checked(family: Family, source: Source, leaves: dict[str, Leaf], tied: bool) -> dict[str, str]:
    """The source's names of tensors by the family's, once each has its shape and none is left."""
    names = {family.renamed_tensor(name): name for name in source.names()}
    wanted = tensor_shapes(leaves)
    for name, shape in wanted.items():
        if name not in names:
            if any(re.search(pattern, name) for pattern in family.unused):
                continue
            raise CheckpointError(
                f"tensor {name} {shape} is missing: the file is not whole, or config.json is of "
                "another model"
            )
        if source.shape(names[name]) != shape:
            raise CheckpointError(
                f"tensor {name} has shape {source.shape(names[name])}, config.json asks for "
                f"{shape}: take the config of this checkpoint"
            )
    harmless = [*family.harmless, *([_head(family)] if tied else [])]
    unused = [
        name
        for name in names
        if name not in wanted and not any(re.search(pattern, name) for pattern in harmless)
    ]
    if unused:
        raise CheckpointError(
            f"{len(unused)} tensors have no place in the model, {unused[0]} the first of them: "
            "it is not the model that config.json says"
        )
    return names


def _head(family: Family) -> str:
    """The name of the output matrix, which a file may repeat though it is the embedding table."""
    return next(re.escape(w.name) for w in family.weights if w.paths == ("head/kernel",))


def _placed(
    source: Source, names: dict[str, str], leaf: Leaf, where: Sharding, dtype: np.dtype
) -> jax.Array:
    """A parameter on its devices: each tensor is read once, into every shard that has a part."""
    indices = where.addressable_devices_indices_map(leaf.shape).values()
    shards = {span: _aligned(span, dtype) for span in {_span(index, leaf) for index in indices}}
    for name, place in leaf.places():
        into = [(_within(place, span), span, out) for span, out in shards.items()]
        into = [each for each in into if each[0] is not None]
        if not into:  # those of another host
            continue
        # Converted as it lies: through a transpose that takes half as long again.
        if name not in names:  # one of `Family.unused`
            for at, _, out in into:
                out[at] = 0
            continue
        tensor = source.read(names[name]).astype(dtype, copy=False)
        own = leaf.weight.form.split(tensor, leaf.sizes, leaf.layer)[leaf.part]
        for at, span, out in into:
            out[at] = own[tuple(slice(*bounds) for bounds in span[leaf.stacked :])]
    return jax.make_array_from_callback(leaf.shape, where, lambda index: shards[_span(index, leaf)])


def _span(index: tuple[slice, ...], leaf: Leaf) -> Span:
    """Start and end of a shard along each axis, the leading ones first."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))


def _within(place: tuple[int, ...], span: Span) -> tuple[int, ...] | None:
    """The place within a shard, if it lies there."""
    leading = span[: len(place)]
    if all(at in range(*bounds) for at, bounds in zip(place, leading, strict=True)):
        return tuple(at - first for at, (first, _) in zip(place, leading, strict=True))
    return None


def _aligned(span: Span, dtype: np.dtype) -> np.ndarray:
    """Room for a shard, which the CPU's device takes over without a copy."""
    shape = tuple(stop - start for start, stop in span)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNED, np.uint8)
    start = -raw.ctypes.data % ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)
