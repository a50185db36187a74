"""The mesh in use, and where activations lie on it where XLA would otherwise have to guess."""

import math

import jax
from jax.sharding import PartitionSpec

from lcm.types import Hidden

CONTEXT = "context"  # the axis of a mesh that sequences are cut over
# Logical axes of activations and matrices, and the axes of a mesh they lie on, as `lcm.parallel`
# names them. `share` is the width of a matrix whose rows are looked up, on the axes that it is cut
# over as a parameter; `copies` are the rows of a batch, and `all` its tokens, as these leave them.
# On the way from there to rows and tokens the width lies in a `part`.
RULES = {
    "rows": ("data", "fsdp"),
    "tokens": (CONTEXT,),
    "width": (),
    "heads": ("tensor",),
    "copies": ("data",),
    "all": (),
    "share": ("fsdp", CONTEXT),
    "part": ("fsdp",),
}


def axes_in_use() -> dict[str, int]:
    """Axes of the mesh in use and their sizes, without those that a `shard_map` has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def shards() -> int:
    """Devices along `context` of the mesh in use, 1 inside of a `shard_map` over it."""
    return axes_in_use().get(CONTEXT, 1)


def axes_of_rows(axes: dict[str, int], batch: int) -> tuple[str, ...] | None:
    """What rows are cut over, of axes in use; None where these do not divide them."""
    names = tuple(name for name in RULES["rows"] if name in axes)
    return names if names and batch % math.prod(axes[name] for name in names) == 0 else None


def placed(x: Hidden, *names: str) -> Hidden:
    """`x`, each axis on the mesh axes of its logical name; as it is where no mesh has those.

    An axis that the mesh does not divide stays with XLA. Without this, XLA may take the layout of
    a layer's weights for its input: with `fsdp`, cut by width and with all rows everywhere.
    """
    free = axes_in_use()
    spec, known = [], False
    for size, name in zip(x.shape, names, strict=True):
        axes = tuple(axis for axis in RULES[name] if axis in free)
        fits = size % math.prod(free[axis] for axis in axes) == 0
        known |= bool(axes)
        spec.append((axes or None) if fits else PartitionSpec.UNCONSTRAINED)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if known else x
