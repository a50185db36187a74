"""Score modifications inside a kernel.

A modification is split in two by what its operations depend on. What follows from its parameters
and the head alone is computed outside, for all heads, and enters the kernel as a few numbers a
head; what touches a score or a position stays, as a function of a tile and those numbers. So a
lookup by head (`slopes_H[head]`) needs no gather in the kernel, and the gradient of any parameter
follows by the chain rule from the gradients of the numbers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from lcm.ops.attention.score import ScoreMod
from lcm.types import Array

LANES = 128


@dataclasses.dataclass(frozen=True)
class Modification:
    """What is static of a score modification: its class and fields, and shapes of its arrays."""

    name: str
    tree: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, mod: ScoreMod) -> "Modification":
        """Of a modification.

        Raises:
            ValueError: if it looks up an array by position, which a kernel cannot.
        """
        leaves, tree = jax.tree.flatten(mod)
        shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]
        self = cls(type(mod).__name__, tree, tuple(shapes))
        self._split((8, 1), (1, LANES))
        return self

    def numbers(self, leaves: Sequence[Array], heads: int) -> tuple[list[Array], list[Array]]:
        """Integers and floats that enter the kernel, each for all heads."""
        outside = core.jaxpr_as_fun(self._split((8, 1), (1, LANES)).outside)
        values = jax.vmap(lambda head: outside(*leaves, head))(jnp.arange(heads, dtype=jnp.int32))
        values = [value.reshape(heads) for value in values]
        return [x for x in values if not _floating(x)], [x for x in values if _floating(x)]

    def counts(self) -> tuple[int, int]:
        """How many integers and floats enter the kernel."""
        crossing = self._split((8, 1), (1, LANES)).crossing
        floats = sum(_floating(v.aval) for v in crossing)
        return len(crossing) - floats, floats

    def __call__(
        self, score: Array, q_pos: Array, k_pos: Array, integers: tuple, floats: tuple
    ) -> Array:
        """The modified scores of a tile of one head, either way round, from scalars."""
        split = self._split(q_pos.shape, k_pos.shape)
        integers, floats = iter(integers), iter(floats)
        given = []
        for v in split.crossing:
            x = next(floats if _floating(v.aval) else integers)
            x = x != 0 if v.aval.dtype == jnp.bool_ else x.astype(v.aval.dtype)
            given.append(jnp.broadcast_to(x, v.aval.shape) if v.aval.shape else x)
        return core.jaxpr_as_fun(split.inside)(*given, score, q_pos, k_pos)[0]

    def _split(self, q_shape: tuple[int, int], k_shape: tuple[int, int]) -> "_Split":
        def call(leaves: tuple, head: Array, score: Array, q_pos: Array, k_pos: Array) -> Array:
            return jax.tree.unflatten(self.tree, leaves)(score, q_pos, k_pos, head)

        integer = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
        score = jax.ShapeDtypeStruct(jnp.broadcast_shapes(q_shape, k_shape), jnp.float32)
        args = self.leaves, integer(()), score, integer(q_shape), integer(k_shape)
        return _split(jax.make_jaxpr(call)(*args), self.name)


class _Split(NamedTuple):
    outside: core.ClosedJaxpr
    inside: core.ClosedJaxpr
    crossing: tuple[core.Var, ...]


def _split(closed: core.ClosedJaxpr, name: str) -> _Split:
    """Operations that need a tile, with those that only blow a number up, and all others."""
    jaxpr, tile = closed.jaxpr, closed.jaxpr.invars[-3:]
    inside, touched = set(), set(tile)
    for number, eqn in enumerate(jaxpr.eqns):
        if touched.intersection(v for v in eqn.invars if isinstance(v, core.Var)):
            inside.add(number)
            touched.update(eqn.outvars)
    made_by = {v: number for number, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    while True:
        crossing = _crossing(jaxpr, inside, touched)
        large = [v for v in crossing if v.aval.size > 1]
        if not large:
            break
        for v in large:
            if v not in made_by:
                raise ValueError(
                    f"score modification {name} looks up an array of shape {v.aval.shape} by "
                    'position, which a TPU kernel cannot: use backend="blockwise"'
                )
            inside.add(made_by[v])
            touched.update(jaxpr.eqns[made_by[v]].outvars)
    outer = [eqn for number, eqn in enumerate(jaxpr.eqns) if number not in inside]
    inner = [jaxpr.eqns[number] for number in sorted(inside)]
    arguments, constants = jaxpr.invars[:-3], (jaxpr.constvars, closed.consts)
    return _Split(
        _closed(jaxpr, arguments, crossing, outer, constants),
        _closed(jaxpr, (*crossing, *tile), jaxpr.outvars, inner),
        crossing,
    )


def _crossing(jaxpr: core.Jaxpr, inside: set[int], touched: set[core.Var]) -> tuple[core.Var, ...]:
    """What the inside reads from the outside, in the order of first use."""
    used = [v for number in sorted(inside) for v in jaxpr.eqns[number].invars]
    used = [v for v in (*used, *jaxpr.outvars) if isinstance(v, core.Var) and v not in touched]
    return tuple(dict.fromkeys(used))


def _closed(
    of: core.Jaxpr, inputs: Sequence[Any], outputs: Sequence[Any], eqns: list, constants: Any = ()
) -> core.ClosedJaxpr:
    constvars, consts = constants or ((), ())
    info = of.debug_info._replace(arg_names=None, result_paths=None)
    return core.ClosedJaxpr(core.Jaxpr(constvars, inputs, outputs, eqns, debug_info=info), consts)


def _floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
