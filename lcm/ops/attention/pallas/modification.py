"""Score modifications inside a kernel.

A modification is split in two by what its operations depend on. What follows from its parameters
and the head alone is computed outside, for all heads, and enters the kernel as a few numbers a
head; what touches a score or a position stays, as a function of a tile and those numbers. So a
lookup by head (`slopes_H[head]`) needs no gather in the kernel, and the gradient of any parameter
follows by the chain rule from the gradients of the numbers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from lcm.ops.attention.score import ScoreMod
from lcm.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Modification:
    """One modification, split; `integers` and `floats` are (shape, dtype) of its numbers."""

    numbers: Callable[..., list[Array]]
    by_query: Callable[..., Array]  # tiles of queries by keys
    by_key: Callable[..., Array]  # tiles of keys by queries
    integers: tuple[tuple, ...]
    floats: tuple[tuple, ...]


@dataclasses.dataclass(frozen=True)
class _Split:
    outside: core.ClosedJaxpr
    inside: core.ClosedJaxpr
    crossing: tuple[core.Var, ...]


def split(mod: ScoreMod, queries: int, keys: int) -> Modification:
    """A modification for tiles of `queries` by `keys`.

    Raises:
        ValueError: if it looks up an array by position, which a kernel cannot.
    """
    leaves, tree = jax.tree.flatten(mod)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]

    def by(q_shape: tuple, k_shape: tuple) -> _Split:
        def call(leaves: list, head: Array, score: Array, q_pos: Array, k_pos: Array) -> Array:
            return jax.tree.unflatten(tree, leaves)(score, q_pos, k_pos, head)

        integer = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
        score = jax.ShapeDtypeStruct(jnp.broadcast_shapes(q_shape, k_shape), jnp.float32)
        args = shapes, integer(()), score, integer(q_shape), integer(k_shape)
        return _split(jax.make_jaxpr(call)(*args), type(mod).__name__)

    by_query, by_key = by((queries, 1), (1, keys)), by((1, queries), (keys, 1))
    kinds = [(v.aval.shape, v.aval.dtype) for v in by_query.crossing]
    is_float = [jnp.issubdtype(dtype, jnp.floating) for _, dtype in kinds]

    def numbers(leaves: Sequence[Array], heads: int) -> list[Array]:
        outside = core.jaxpr_as_fun(by_query.outside)
        values = jax.vmap(lambda head: outside(*leaves, head))(jnp.arange(heads, dtype=jnp.int32))
        return [value.reshape(heads) for value in values]

    return Modification(
        numbers,
        _inside(by_query),
        _inside(by_key),
        tuple(kind for kind, f in zip(kinds, is_float, strict=True) if not f),
        tuple(kind for kind, f in zip(kinds, is_float, strict=True) if f),
    )


def _inside(parts: _Split) -> Callable[..., Array]:
    """`f(score, q_pos, k_pos, integers, floats)` of scalars int32 and float32."""
    run = core.jaxpr_as_fun(parts.inside)
    kinds = [v.aval for v in parts.crossing]

    def call(score: Array, q_pos: Array, k_pos: Array, integers: tuple, floats: tuple) -> Array:
        integers, floats = iter(integers), iter(floats)
        given = []
        for aval in kinds:
            x = next(floats if jnp.issubdtype(aval.dtype, jnp.floating) else integers)
            x = x != 0 if aval.dtype == jnp.bool_ else x.astype(aval.dtype)
            given.append(jnp.broadcast_to(x, aval.shape) if aval.shape else x)
        return run(*given, score, q_pos, k_pos)[0]

    return call


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
    return _Split(
        _closed(closed, jaxpr.invars[:-3], crossing, outer),
        _closed(None, (*crossing, *tile), jaxpr.outvars, inner),
        crossing,
    )


def _crossing(jaxpr: core.Jaxpr, inside: set[int], touched: set[core.Var]) -> tuple[core.Var, ...]:
    """What the inside reads from the outside, in the order of first use."""
    used = [v for number in sorted(inside) for v in jaxpr.eqns[number].invars]
    used = [v for v in (*used, *jaxpr.outvars) if isinstance(v, core.Var) and v not in touched]
    return tuple(dict.fromkeys(used))


def _closed(
    like: core.ClosedJaxpr | None, inputs: Sequence[Any], outputs: Sequence[Any], eqns: list
) -> core.ClosedJaxpr:
    constvars, consts = (like.jaxpr.constvars, like.consts) if like else ((), ())
    return core.ClosedJaxpr(core.Jaxpr(constvars, inputs, outputs, eqns), consts)
