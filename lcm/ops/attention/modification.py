"""Score modifications cut in two, for kernels.

What follows from parameters and heads alone is computed outside and enters a kernel as numbers:
one for a tile, or a column, one for each row of it. What touches a score or a position stays
inside. So a lookup by head (`slopes_H[head]`) needs no gather in a kernel, and the gradient of any
parameter follows by the chain rule from the gradients of the numbers. A kernel whose queries are
few has their positions outside too.

Of a lookup by position, `table_NH[bucket(i - j), head]`, the head is looked up outside: what is
left enters as a table of one row, or one for each row of the tile, and `lookup` reads it.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from lcm.ops.attention.lookup import LANES, LARGEST, lookup
from lcm.ops.attention.score import ScoreMod
from lcm.types import Array

Env = dict[core.Var, Array]


@dataclasses.dataclass(frozen=True)
class Modification:
    """What is static of a score modification: its class and fields, and shapes of its arrays."""

    name: str
    tree: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, mod: ScoreMod) -> "Modification":
        """Of a modification, which may not fit in a kernel."""
        leaves, tree = jax.tree.flatten(mod)
        shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]
        return cls(type(mod).__name__, tree, tuple(shapes))

    def for_head(self, q_pos: tuple[int, int], k_pos: tuple[int, int]) -> "Split":
        """For tiles of one head with positions of these shapes, either way round."""
        return _split(self, (), q_pos, k_pos, inner=3)

    def for_rows(self, rows: int, keys: int) -> "Split":
        """For tiles whose rows are of several heads, and know the positions of their queries."""
        return _split(self, (rows, 1), (rows, 1), (1, keys), inner=2)


class Lookup(NamedTuple):
    """A gather of single entries of `operand` at columns of indices, one for each axis of it.

    fixed: axes whose index is known outside, `moving`: those looked up in the kernel.
    fill: what stands for entries beyond the end; `None` for the last one.
    """

    operand: Any
    columns: tuple["_Column", ...]
    fixed: tuple[int, ...]
    moving: tuple[int, ...]
    fill: float | None

    def table(self, env: Env, rows: int) -> Array:
        """`[rows or 1, lanes]`, in whole lanes, from what is known outside."""
        at = [self.columns[axis].read(env)[:rows, 0] for axis in self.fixed]
        operand = _read(env, self.operand).transpose(self.fixed + self.moving)
        table = operand[tuple(at)] if at else operand[None]
        table = table.reshape(table.shape[0], -1).astype(jnp.float32)
        return jnp.pad(table, ((0, 0), (0, -table.shape[1] % LANES)))

    def index(self, env: Env) -> tuple[Array, Array | None]:
        """Where a tile looks in the table, and whether that is in range if it matters."""
        flat, within = 0, None
        for axis in self.moving:
            size, at = self.operand.aval.shape[axis], self.columns[axis].read(env)
            if self.fill is not None:
                here = (at >= 0) & (at < size)
                within = here if within is None else within & here
            flat = flat * size + jnp.clip(at, 0, size - 1)
        return flat, within

    def entries(self, env: Env, table: Array, dtype: jnp.dtype) -> Array:
        """What the gather has for a tile."""
        index, within = self.index(env)
        found = lookup(table, index)
        return (found if within is None else jnp.where(within, found, self.fill)).astype(dtype)


class Split(NamedTuple):
    """A modification for tiles of one form; numbers and tables cross from outside to inside."""

    jaxpr: core.Jaxpr
    consts: tuple[Array, ...]
    inner: int
    outside: tuple[int, ...]
    inside: tuple[int, ...]
    lookups: dict[int, Lookup]
    crossing: tuple[core.Var, ...]
    rows: int

    @property
    def numbers(self) -> tuple[jax.core.ShapedArray, ...]:
        """What crosses as a number, or a column where its size is above 1."""
        return tuple(v.aval for v in self.crossing)

    @property
    def lanes(self) -> tuple[int, ...]:
        """Lanes of the tables that cross."""
        sizes = (math.prod(_shape(x.operand, x.moving)) for x in self.lookups.values())
        return tuple(-(-size // LANES) * LANES for size in sizes)

    def cross(self, *known: Array) -> tuple[list[Array], list[Array]]:
        """Numbers and tables from parameters, the head and, in `for_rows`, positions of queries."""
        env = dict(zip(self.jaxpr.constvars, self.consts, strict=True))
        env |= zip(self.jaxpr.invars[: -self.inner], known, strict=True)
        _evaluate(self.jaxpr, self.outside, env)
        tables = [found.table(env, self.rows) for found in self.lookups.values()]
        return [env[v] for v in self.crossing], tables

    def __call__(self, numbers: Sequence[Array], tables: Sequence[Array], *tile: Array) -> Array:
        """The modified scores of a tile: of (positions of queries), scores, positions of keys."""
        env = {v: _as(x, v.aval) for v, x in zip(self.crossing, numbers, strict=True)}
        env |= zip(self.jaxpr.invars[-self.inner :], tile, strict=True)
        _evaluate(self.jaxpr, self.inside, env, dict(zip(self.lookups, tables, strict=True)), self)
        return _read(env, self.jaxpr.outvars[0])


def is_floating(x: Any) -> bool:
    """Whether an array, or what describes one, is of floats."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def is_column(aval: jax.core.ShapedArray) -> bool:
    """Whether what crosses is a number a row, not one for all."""
    return aval.size > 1


@functools.lru_cache(maxsize=256)
def _split(
    mod: Modification, head: tuple, q_pos: tuple[int, int], k_pos: tuple[int, int], inner: int
) -> Split:
    """Cut where the last `inner` of (head, positions of queries, scores, positions of keys) enter.

    Raises:
        ValueError: if an array is looked up by position in a way that a kernel cannot.
    """

    def call(leaves: tuple, head: Array, q_pos: Array, score: Array, k_pos: Array) -> Array:
        return jax.tree.unflatten(mod.tree, leaves)(score, q_pos, k_pos, head)

    integers = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    score = jax.ShapeDtypeStruct(jnp.broadcast_shapes(q_pos, k_pos), jnp.float32)
    args = mod.leaves, integers(head), integers(q_pos), score, integers(k_pos)
    closed = _inlined(jax.make_jaxpr(call)(*args))
    jaxpr, rows = closed.jaxpr, head[0] if head else 1
    tile = set(jaxpr.invars[-inner:])
    on_tile, touched = _on_tile(jaxpr, tile)
    lookups = _lookups(jaxpr, on_tile, touched, mod.name)
    inside, crossing = _inside(jaxpr, tile, on_tile, lookups, rows, mod.name)
    outside = [n for n in range(len(jaxpr.eqns)) if n not in on_tile]
    return Split(
        jaxpr,
        tuple(closed.consts),
        inner,
        tuple(outside),
        inside,
        {n: lookups[n] for n in inside if n in lookups},
        crossing,
        rows,
    )


def _inlined(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The same operations without calls of functions that are jitted."""

    def run(jaxpr: core.Jaxpr, consts: Sequence[Any], *args: Any) -> list[Any]:
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("jit", "pjit"):
                inner, given = eqn.params["jaxpr"], [_read(env, v) for v in eqn.invars]
                env |= zip(eqn.outvars, run(inner.jaxpr, inner.consts, *given), strict=True)
            else:
                env |= _done(jaxpr, eqn, env)
        return [_read(env, v) for v in jaxpr.outvars]

    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
    return jax.make_jaxpr(functools.partial(run, closed.jaxpr, closed.consts))(*avals)


def _evaluate(
    jaxpr: core.Jaxpr,
    numbers: Sequence[int],
    env: Env,
    tables: dict[int, Array] | None = None,
    split: Split | None = None,
) -> None:
    """Some operations of a jaxpr, in their order; lookups by their tables."""
    for n in numbers:
        eqn = jaxpr.eqns[n]
        if tables and n in tables:
            dtype = eqn.outvars[0].aval.dtype
            env[eqn.outvars[0]] = split.lookups[n].entries(env, tables[n], dtype)
        else:
            env |= _done(jaxpr, eqn, env)


def _done(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, env: Env) -> Iterator[tuple[core.Var, Array]]:
    """What one operation makes."""
    inputs, info = list(dict.fromkeys(_variables(eqn.invars))), jaxpr.debug_info
    info = info._replace(arg_names=None, result_paths=None)
    alone = core.Jaxpr((), inputs, eqn.outvars, [eqn], debug_info=info)
    made = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*(env[v] for v in inputs))
    return zip(eqn.outvars, made, strict=True)


def _read(env: Env, v: Any) -> Any:
    return v.val if isinstance(v, core.Literal) else env[v]


def _as(x: Array, aval: jax.core.ShapedArray) -> Array:
    """A number as the type and shape that it had outside."""
    x = x != 0 if aval.dtype == jnp.bool_ else x.astype(aval.dtype)
    return jnp.broadcast_to(x, aval.shape) if aval.shape else x


def _on_tile(jaxpr: core.Jaxpr, tile: set[core.Var]) -> tuple[set[int], set[core.Var]]:
    """Operations that need something of a tile, and all that is made of it."""
    needed, touched = set(), set(tile)
    for n, eqn in enumerate(jaxpr.eqns):
        if touched.intersection(_variables(eqn.invars)):
            needed.add(n)
            touched.update(eqn.outvars)
    return needed, touched


def _inside(
    jaxpr: core.Jaxpr,
    tile: set[core.Var],
    on_tile: set[int],
    lookups: dict[int, Lookup],
    rows: int,
    name: str,
) -> tuple[tuple[int, ...], tuple[core.Var, ...]]:
    """Operations for a kernel and what they need from outside, in the order of first use.

    Those on the tile that the result needs, and those before them that widen a column or a number.
    """
    made_by = {v: n for n, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    inside, crossing, wanted = set(), {}, list(_variables(jaxpr.outvars))
    while wanted:
        v = wanted.pop()
        maker = made_by.get(v)
        number = v.aval.size == 1 or v.aval.shape == (rows, 1)
        if v in tile or maker in inside:
            continue
        if maker not in on_tile and number:
            crossing[v] = None
        elif maker is None:
            raise ValueError(_refusal(name, v.aval.shape, "in a way"))
        else:
            inside.add(maker)
            wanted += _needs(jaxpr.eqns[maker], lookups.get(maker))
    order = [v for n in sorted(inside) for v in _needs(jaxpr.eqns[n], lookups.get(n))]
    order = [v for v in (*order, *_variables(jaxpr.outvars)) if v in crossing]
    return tuple(sorted(inside)), tuple(dict.fromkeys(order))


def _needs(eqn: core.JaxprEqn, found: Lookup | None) -> list[core.Var]:
    if found is None:
        return list(_variables(eqn.invars))
    return list(_variables(found.columns[axis].source for axis in found.moving))


def _variables(of: Sequence[Any]) -> Iterator[core.Var]:
    return (v for v in of if isinstance(v, core.Var))


class _Column(NamedTuple):
    """Indices along one axis: a variable, and how it is spread over a tile."""

    source: Any
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def read(self, env: Env) -> Array:
        return jax.lax.broadcast_in_dim(_read(env, self.source), self.shape, self.axes)


def _lookups(
    jaxpr: core.Jaxpr, on_tile: set[int], touched: set[core.Var], name: str
) -> dict[int, Lookup]:
    """Gathers from arrays that are known outside, by indices that are not."""
    made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    found = {}
    for n in sorted(on_tile):
        eqn = jaxpr.eqns[n]
        if eqn.primitive.name == "gather" and eqn.invars[0] not in touched:
            found[n] = _lookup(eqn, made_by, touched, name)
    return found


def _lookup(eqn: core.JaxprEqn, made_by: dict, touched: set[core.Var], name: str) -> Lookup:
    operand, indices = eqn.invars
    numbers, shape = eqn.params["dimension_numbers"], operand.aval.shape
    columns = _columns(indices, made_by)
    single = all(size == 1 for size in eqn.params["slice_sizes"]) and not numbers.offset_dims
    if columns is None or not single or sorted(numbers.start_index_map) != [*range(len(shape))]:
        raise ValueError(_refusal(name, shape, "otherwise than entry by entry"))
    if not is_floating(operand.aval):
        raise ValueError(_refusal(name, shape, f"as {operand.aval.dtype}, not a float,"))
    by_axis = dict(zip(numbers.start_index_map, columns, strict=True))
    columns = tuple(by_axis[axis] for axis in range(len(shape)))
    moves = [isinstance(c.source, core.Var) and c.source in touched for c in columns]
    fixed = tuple(axis for axis, moving in enumerate(moves) if not moving)
    moving = tuple(axis for axis, moving in enumerate(moves) if moving)
    entries = math.prod(_shape(operand, moving))
    if entries > LARGEST:
        raise ValueError(
            f"score modification {name} looks up {entries} entries of an array of shape {shape} by "
            f"position, a TPU kernel at most {LARGEST}: use fewer, as in buckets of distance, or "
            f"{_WAY_OUT}"
        )
    fills = eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    fill = eqn.params["fill_value"]
    return Lookup(
        operand, columns, fixed, moving, (jnp.nan if fill is None else fill) if fills else None
    )


_WAY_OUT = 'backend="blockwise", in decoding backend="reference"'


def _refusal(name: str, shape: tuple[int, ...], how: str) -> str:
    return (
        f"score modification {name} looks up an array of shape {shape} by position {how}, which a "
        f"TPU kernel cannot: use {_WAY_OUT}"
    )


def _shape(operand: core.Var, axes: tuple[int, ...]) -> list[int]:
    return [operand.aval.shape[axis] for axis in axes]


def _columns(indices: Any, made_by: dict) -> tuple[_Column, ...] | None:
    """Indices `[..., axes]` as a column for each axis; `None` if they are made otherwise."""
    eqn = made_by.get(indices) if isinstance(indices, core.Var) else None
    if eqn is None:
        return None
    shape, source = indices.aval.shape, eqn.invars[0]
    match eqn.primitive.name:
        case "concatenate" if eqn.params["dimension"] == len(shape) - 1:
            parts = [_columns(v, made_by) for v in eqn.invars]
            return None if None in parts else tuple(c for part in parts for c in part)
        case "broadcast_in_dim" if shape[-1] == 1:
            axes = eqn.params["broadcast_dimensions"]
            if len(shape) - 1 not in axes:
                return (_Column(source, shape[:-1], axes),)
        case "reshape" if shape[-1] == 1 and source.aval.shape == shape[:-1]:
            return (_Column(source, shape[:-1], tuple(range(len(shape) - 1))),)
    return None
