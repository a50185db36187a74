"""Which tensor, or part of one, stands where in our parameters: the same for in and out."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from lcm.errors import ConfigError
from lcm.models import ModelSpec, decoder
from lcm.nn import LayerSpec
from lcm.parallel import path
from lcm.pretrained.families.base import Family, Weight

# Weights and the part of each, by paths of ours, whether they are of a layer, and for which mixer.
Homes = dict[tuple[str, bool, str], tuple[Weight, int]]


class Leaf(NamedTuple):
    """A parameter of ours and the tensors it is made of.

    names: of tensors, in the order of their places along the leading axes; or the only one.
    stacked: how many such axes there are: one of layers, and perhaps one of experts.
    part: which of the weight's paths it is.
    sizes: the last axes of all of them.
    layer: the one it is of, or the first.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: int
    weight: Weight
    part: int
    sizes: tuple[int, ...]
    layer: LayerSpec

    def places(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each tensor's name, and where it lies along the leading axes."""
        return zip(self.names, np.ndindex(self.shape[: self.stacked]), strict=True)


def layout(family: Family, spec: ModelSpec) -> dict[str, Leaf]:
    """Every parameter by its path.

    Raises:
        ConfigError: for a parameter that the family has no tensor for.
    """
    shapes = _shapes(spec)
    homes = {
        (at, "{" in weight.name, weight.mixer): (weight, part)
        for weight in family.weights
        for part, at in enumerate(weight.paths)
    }
    places = family.places(spec)
    return {name: _leaf(name, shapes, homes, spec, places) for name in shapes}


def _leaf(
    name: str,
    shapes: dict[str, tuple[int, ...]],
    homes: Homes,
    spec: ModelSpec,
    places: list[dict[str, Any]],
) -> Leaf:
    prefix, kind, below = _divided(name, spec)
    stacked = prefix.startswith("layers/")
    mixers = (spec.layers[kind].mixer, "") if stacked else ("blocks",) if prefix else ("",)
    keys = [(below, bool(prefix), mixer) for mixer in mixers]
    key = next((key for key in keys if key in homes), None)
    if key is None:
        raise ConfigError(
            f"parameter {name} {shapes[name]} has no tensor in this family: it belongs to what "
            "lcm adds, such as a learned encoding"
        )
    weight, part = homes[key]
    siblings = [shapes[prefix + at] for at in weight.paths]
    layers = range(kind, spec.depth, len(spec.layers)) if stacked else [kind]
    experts = range(shapes[name][1] if "{e}" in weight.name else 1)
    return Leaf(
        shape=shapes[name],
        names=tuple(weight.name.format(**places[n], e=e) for n in layers for e in experts),
        stacked=stacked + ("{e}" in weight.name),
        weight=weight,
        part=part,
        sizes=tuple(shape[-1] for shape in siblings),
        layer=spec.layers[kind],
    )


def _divided(name: str, spec: ModelSpec) -> tuple[str, int, str]:
    """`layers/1/mixer/q` as (layers/1/, 1, mixer/q), `blocks/0/q` with the first kind of layer that
    uses the block, as (blocks/0/, 1, q); others as ("", 0, name)."""
    if not name.startswith(("layers/", "blocks/")):
        return "", 0, name
    of, number, below = name.split("/", 2)
    kind = int(number)
    if of == "blocks":
        used = (layer.option("block") if layer.shares else None for layer in spec.layers)
        kind = list(used).index(int(number))
    return f"{of}/{number}/", kind, below


@functools.cache
def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    tree = decoder.shapes(spec)
    return {path(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def tensors(leaves: dict[str, Leaf]) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Every tensor: its name, the paths of ours in it, and its place along the leading axes."""
    for at, leaf in leaves.items():
        if leaf.part == 0:
            prefix = at.removesuffix(leaf.weight.paths[0])
            for name, place in leaf.places():
                yield name, tuple(prefix + p for p in leaf.weight.paths), place


def tensor_shapes(leaves: dict[str, Leaf]) -> dict[str, tuple[int, ...]]:
    """The shape that each tensor must have."""
    found = {}
    for name, paths, _ in tensors(leaves):
        own = [leaves[at] for at in paths]
        shapes = tuple(leaf.shape[leaf.stacked :] for leaf in own)
        found[name] = _joined_shape(own[0].weight.form.join, shapes, own[0].layer)
    return found


@functools.cache
def _joined_shape(join: Any, shapes: tuple, layer: LayerSpec) -> tuple[int, ...]:
    return join([np.broadcast_to(np.int8(0), shape) for shape in shapes], layer).shape
