"""Score modifications inside the kernel.

What follows from parameters, heads and positions of queries is computed outside, for every row of
queries, and enters the kernel as a column or a number; what touches a score or the position of a
key stays inside. So a lookup by head (`slopes_H[head]`) needs no gather in the kernel.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from lcm.ops.attention.score import ScoreMod
from lcm.types import Array


class Modification(NamedTuple):
    """A modification for tiles of `rows` by `keys`; `crossing` enters the kernel from outside."""

    outside: core.ClosedJaxpr
    inside: core.ClosedJaxpr
    crossing: tuple[jax.core.ShapedArray, ...]

    def numbers(self, mod: ScoreMod, q_pos: Array, head: Array) -> list[Array]:
        """What crosses: a scalar, or a column `[..., rows, 1]` for tiles `q_pos [..., rows, 1]`."""
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(mod)]
        shape, head = q_pos.shape, jnp.broadcast_to(head, q_pos.shape)
        tiles = (x.reshape(-1, *shape[-2:]) for x in (head, q_pos))
        outside = core.jaxpr_as_fun(self.outside)
        found = jax.vmap(lambda head, q_pos: outside(*leaves, head, q_pos))(*tiles)
        return [
            x.reshape(shape) if self.is_column(aval) else x[0].reshape(())
            for x, aval in zip(found, self.crossing, strict=True)
        ]

    @property
    def floats(self) -> int:
        """How many columns of floats cross."""
        kinds = [jnp.issubdtype(aval.dtype, jnp.floating) for aval in self.crossing]
        return sum(k and self.is_column(a) for k, a in zip(kinds, self.crossing, strict=True))

    @staticmethod
    def is_column(aval: jax.core.ShapedArray) -> bool:
        """Whether what crosses is a number a row, not one for all."""
        return aval.size > 1

    def __call__(self, score: Array, k_pos: Array, given: Iterable[Array]) -> Array:
        """Modified scores of a tile, from what crosses: scalars and columns."""
        given = [_cast(x, aval) for x, aval in zip(given, self.crossing, strict=True)]
        return core.jaxpr_as_fun(self.inside)(*given, score, k_pos)[0]


def _cast(x: Array, aval: jax.core.ShapedArray) -> Array:
    """A number as the type and shape that it had outside."""
    x = x != 0 if aval.dtype == jnp.bool_ else x.astype(aval.dtype)
    return x if x.shape == aval.shape else jnp.full(aval.shape, x)


def split(mod: ScoreMod, rows: int, keys: int) -> Modification:
    """A modification, cut in two.

    Raises:
        ValueError: if it looks up an array by the position of a key, which a kernel cannot.
    """
    leaves, tree = jax.tree.flatten(mod)

    def call(leaves: list, head: Array, q_pos: Array, score: Array, k_pos: Array) -> Array:
        return jax.tree.unflatten(tree, leaves)(score, q_pos, k_pos, head)

    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]
    score = jax.ShapeDtypeStruct((rows, keys), jnp.float32)
    args = shapes, integers(rows, 1), integers(rows, 1), score, integers(1, keys)
    closed = jax.make_jaxpr(call)(*args)
    jaxpr, tile = closed.jaxpr, closed.jaxpr.invars[-2:]
    on_tile = _on_tile(jaxpr, tile)
    inside = _inside(jaxpr, tile, on_tile, rows, type(mod).__name__)
    crossing = _crossing(jaxpr, inside, tile)
    inner = [eqn for n, eqn in enumerate(jaxpr.eqns) if n in inside]
    outer = [eqn for n, eqn in enumerate(jaxpr.eqns) if n not in on_tile]
    constants = jaxpr.constvars, closed.consts
    return Modification(
        _closed(jaxpr, jaxpr.invars[:-2], crossing, outer, constants),
        _closed(jaxpr, (*crossing, *tile), jaxpr.outvars, inner, ((), ())),
        tuple(v.aval for v in crossing),
    )


def _on_tile(jaxpr: core.Jaxpr, tile: Sequence[core.Var]) -> set[int]:
    """Operations that need the scores or the positions of keys."""
    needed, touched = set(), set(tile)
    for n, eqn in enumerate(jaxpr.eqns):
        if touched.intersection(v for v in eqn.invars if isinstance(v, core.Var)):
            needed.add(n)
            touched.update(eqn.outvars)
    return needed


def _inside(
    jaxpr: core.Jaxpr, tile: Sequence[core.Var], on_tile: set[int], rows: int, name: str
) -> set[int]:
    """Operations on the tile, and those before them that widen a column or a number."""
    made_by = {v: n for n, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    inside = set(on_tile)
    while True:
        crossing = _crossing(jaxpr, inside, tile)
        wide = [v for v in crossing if v.aval.size > 1 and v.aval.shape != (rows, 1)]
        if not wide:
            return inside
        for v in wide:
            if v not in made_by:
                raise ValueError(
                    f"score modification {name} looks up an array of shape {v.aval.shape} by the "
                    'position of a key, which a TPU kernel cannot: use backend="reference"'
                )
            inside.add(made_by[v])


def _crossing(
    jaxpr: core.Jaxpr, inside: set[int], tile: Sequence[core.Var]
) -> tuple[core.Var, ...]:
    """What the inside reads from the outside, in the order of first use."""
    made = {*tile, *(v for n in inside for v in jaxpr.eqns[n].outvars)}
    used = [v for n in sorted(inside) for v in jaxpr.eqns[n].invars]
    used = [v for v in (*used, *jaxpr.outvars) if isinstance(v, core.Var) and v not in made]
    return tuple(dict.fromkeys(used))


def _closed(
    of: core.Jaxpr, inputs: Sequence, outputs: Sequence, eqns: list, constants: tuple
) -> core.ClosedJaxpr:
    constvars, consts = constants
    info = of.debug_info._replace(arg_names=None, result_paths=None)
    return core.ClosedJaxpr(core.Jaxpr(constvars, inputs, outputs, eqns, debug_info=info), consts)
