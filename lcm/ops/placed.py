"""Where activations lie on the mesh, for what XLA would otherwise have to guess."""

import math

import jax
from jax.sharding import PartitionSpec

from lcm.types import Hidden

# Logical axes of activations, and the axes of a mesh, as `lcm.parallel` names them, they lie on.
RULES = {"rows": ("data", "fsdp"), "tokens": ("context",), "width": ()}


def placed(x: Hidden, *names: str) -> Hidden:
    """`x`, each axis on the mesh axes of its logical name; as it is where no mesh has those.

    An axis that the mesh does not divide stays with XLA. Without this, XLA may take the layout of
    a layer's weights for its input: with `fsdp`, cut by width and with all rows everywhere.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name: n for name, n in mesh.shape.items() if name not in mesh.manual_axes}
    spec, known = [], False
    for size, name in zip(x.shape, names, strict=True):
        axes = tuple(axis for axis in RULES[name] if axis in free)
        fits = size % math.prod(free[axis] for axis in axes) == 0
        known |= bool(axes)
        spec.append((axes or None) if fits else PartitionSpec.UNCONSTRAINED)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec)) if known else x
