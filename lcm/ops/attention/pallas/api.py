"""`attend` on kernels: arrays laid out in whole tiles, and the rule for their gradients."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm.ops.attention.mask import reaches
from lcm.ops.attention.modification import Modification, is_floating
from lcm.ops.attention.pallas import backward, maps, tiles, visits
from lcm.ops.attention.pallas import plan as plans
from lcm.ops.attention.pallas.forward import forward
from lcm.ops.attention.pallas.kernel import LOG2E
from lcm.ops.attention.pallas.plan import Plan
from lcm.ops.attention.pallas.visits import Room
from lcm.ops.attention.part import Part, Partial
from lcm.ops.tpu import LANES
from lcm.types import Array, Context, Values


class _Inputs(NamedTuple):
    """Queries `[B, H, L, K]`, keys and values `[B, G, S, K]`, what modifications cross with."""

    q: tuple[Array, ...]
    k: tuple[Array, ...]
    v: Array
    floats: Array
    tables: Array


class _Places(NamedTuple):
    """What is known of queries and keys, `[B, rows, L]` and `[B, rows, S]`; which tiles to compute.

    Segments, positions and intervals of queries; segments, positions and blocks of maps of keys.
    """

    q_info: Array
    k_info: Array
    tiles: tiles.Tiles
    integers: Array
    lists: tuple[Array, ...]


def attend(
    parts: tuple[Part, ...],
    v_BSGK: Values,
    q_context: Context,
    k_context: Context,
    scale: float,
    known: Partial | None = None,
) -> Partial:
    """One softmax over the scores of all parts, and the logarithm of its denominator.

    If `q_context is k_context`, positions must increase
    from token to token within a segment, as in packed rows: then tiles are skipped by index.
    Kernels have one size of head: of keys and values the smaller ones are filled up with zeros.

    known: the result over these keys and others. It is given back, and its gradient goes to these.

    Raises:
        ValueError: for block maps of too small blocks or too many tiles, or a score modification
            that looks up more by position than a kernel can.
    """
    length, heads = parts[0].q_BLHK.shape[1:3]
    kv_heads, own = v_BSGK.shape[2:]
    size = max(own, parts[0].q_BLHK.shape[-1])
    mapped = [part.blocks for part in parts if part.blocks is not None]
    queries, keys = sides = _sides(parts)
    q_info, rows = _known_of_queries(parts, q_context, queries)
    k_info, forms = _known_of_keys(parts, k_context, keys)
    masks = tuple(part.mask for part in parts)
    band = reaches(masks) if q_context is k_context else (None, None)
    near = tiles.inside(band, q_info.shape[2] // queries, k_info.shape[2] // keys, queries, keys)
    live, plain = (x & near for x in tiles.kinds(q_info, k_info, rows, queries, keys))
    pairs, room, table = int(near.sum()) * queries * keys, None, None
    if parts[0].row:
        pairs = round(pairs * tiles.share(reaches(masks), parts[0].row, queries, keys))
    if mapped:
        table, room = _visited(parts, live, plain, near, sides)
        pairs = room.by_query * queries * keys
    mods = tuple(
        None if part.score_mod is None else Modification.of(part.score_mod) for part in parts
    )
    integers, floats, tables = _numbers(parts, mods, heads)
    plan = Plan(
        heads,
        kv_heads,
        queries,
        keys,
        rows,
        mods,
        forms,
        room,
        pairs,
        plans.interpret,
    )

    def query_blocks(part: Part) -> Array:
        factor = scale if part.score_mod is not None else scale * LOG2E
        q = (part.q_BLHK.astype(jnp.float32) * factor).astype(part.q_BLHK.dtype)
        return _padded(_wide(q, size), queries).transpose(0, 2, 1, 3)

    def key_blocks(k_BSGK: Array) -> Array:
        return _padded(_wide(k_BSGK, size), keys).transpose(0, 2, 1, 3)

    inputs = _Inputs(
        tuple(query_blocks(part) for part in parts),
        tuple(key_blocks(part.k_BSGK) for part in parts),
        key_blocks(v_BSGK),
        floats,
        tables,
    )
    table = tiles.tiles(live, plain) if table is None else table
    listed = tuple(maps.lists(blocks, q_info.shape[2]) for blocks in mapped)
    places = _Places(q_info, k_info, table, integers, listed)
    if known is None:
        out, lse = _attention(plan, inputs, places)
    else:
        lse = jnp.pad(known.lse_BLH, ((0, 0), (0, -length % queries), (0, 0)))
        out = _padded(_wide(known.out_BLHK, size), queries).transpose(0, 2, 1, 3)
        out, lse = _known(plan, inputs, places, (out, lse.transpose(0, 2, 1)))
    out = out.transpose(0, 2, 1, 3)[:, :length]
    return Partial(out if own == size else out[..., :own], lse.transpose(0, 2, 1)[:, :length])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, inputs: _Inputs, places: _Places) -> tuple[Array, Array]:
    return _forward(plan, inputs, places)[0]


def _forward(plan: Plan, inputs: _Inputs, places: _Places) -> tuple[tuple[Array, Array], Any]:
    run = places.tiles
    known = places.q_info, places.k_info, run.by_query, run.key_steps, places.integers
    out, lse = forward(
        plan, inputs.q, inputs.k, inputs.v, *known, inputs.floats, inputs.tables, places.lists
    )
    lse = lse[:, :, 0]
    return (out, lse), (inputs, places, out, lse)


def _backward(plan: Plan, kept: tuple, d: tuple[Array, Array]) -> tuple[_Inputs, None]:
    inputs, places, out, lse = kept
    d_out, d_lse = d
    some = lse > -jnp.inf
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    given = backward.Given(
        *inputs,
        d_out,
        jnp.where(some, lse * LOG2E, 0.0)[:, :, None],
        (delta - jnp.where(some, d_lse, 0.0))[:, :, None],
        places.q_info,
        places.k_info,
        places.integers,
        places.lists,
    )
    run = places.tiles
    d_q, d_floats, d_tables = backward.of_queries(plan, given, run.by_query, run.key_steps)
    d_k, d_v = backward.of_keys(plan, given, run.by_key, run.query_steps)
    return _Inputs(d_q, d_k, d_v, d_floats, d_tables), None


_attention.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _known(
    plan: Plan, inputs: _Inputs, places: _Places, result: tuple[Array, Array]
) -> tuple[Array, Array]:
    return result


_known.defvjp(
    lambda plan, inputs, places, result: (result, (inputs, places, *result)),
    lambda plan, kept, d: (*_backward(plan, kept, d), None),
)


def _known_of_queries(
    parts: tuple[Part, ...], context: Context, block: int
) -> tuple[Array, tuple[tuple[int | None, int | None], ...]]:
    """Segments, positions, and the sides of each part's interval; and where the sides stand."""
    known, rows = [context.segments_BL, context.positions_BL], []
    for part in parts:
        where = []
        for side in tiles.interval(part.mask, jnp.asarray(context.positions_BL)):
            where.append(None if side is None else len(known))
            known += [] if side is None else [side]
        rows.append(tuple(where))
    return _stacked(known, block), tuple(rows)


def _known_of_keys(
    parts: tuple[Part, ...], context: Context, block: int
) -> tuple[Array, tuple[maps.Form | None, ...]]:
    """Segments, -1 where padding so that no query has it, positions, and blocks of each map."""
    known, forms = [context.segments_BL, context.positions_BL], []
    slot = jnp.arange(context.segments_BL.shape[1])
    for blocks in (part.blocks for part in parts):
        form = None if blocks is None else maps.Form(blocks.size, len(known))
        forms.append(form)
        if form is not None:
            known.append(jnp.broadcast_to(slot // blocks.size, context.segments_BL.shape))
    known = _stacked(known, block)
    segments = known[:, tiles.SEGMENT]
    known = known.at[:, tiles.SEGMENT].set(jnp.where(segments > 0, segments, -1))
    return known, tuple(forms)


def _visited(
    parts: tuple[Part, ...], live: Array, plain: Array, near: np.ndarray, sides: tuple[int, int]
) -> tuple[tiles.Tiles, Room]:
    """Lists of the tiles that masks, segments and maps leave, and their size, known before."""
    batch, (heads, kv_heads) = live.shape[1], (parts[0].q_BLHK.shape[2], parts[0].k_BSGK.shape[2])
    some, every = zip(*(_listed(part, near, sides) for part in parts), strict=True)
    room = _room(parts, near, some, sides)
    room.check(batch)

    def of_parts(kind: Array, listed: tuple) -> Array:
        shape = batch, room.heads, *near.shape
        pairs = zip(kind, listed, strict=True)
        return jnp.stack([jnp.broadcast_to(x[:, None] & own, shape) for x, own in pairs])

    live, plain = of_parts(live, some), of_parts(plain, every)
    return visits.visits(live, plain, room, kv_heads, heads // kv_heads), room


def _listed(
    part: Part, near: np.ndarray, sides: tuple[int, int]
) -> tuple[Array | np.ndarray, Array | np.ndarray]:
    """Tiles that a part's map lists some of and all of, `[H or 1, q_blocks, k_blocks]`."""
    if part.blocks is None:
        return np.ones((1, *near.shape), bool), np.ones((1, *near.shape), bool)
    return maps.kinds(part.blocks, part.k_BSGK.shape[1], near.shape, sides)


def _room(parts: tuple[Part, ...], near: np.ndarray, some: tuple, sides: tuple[int, int]) -> Room:
    """The size of the lists of tiles."""
    length, heads = parts[0].q_BLHK.shape[1:3]
    kv_heads = parts[0].k_BSGK.shape[2]
    most = [
        np.full(near.shape[0], near.shape[1])
        if part.blocks is None
        else maps.most(part.blocks, length, near.shape, sides)
        for part in parts
    ]
    return visits.room(near, some, most, kv_heads, heads // kv_heads)


def _sides(parts: tuple[Part, ...]) -> tuple[int, int]:
    """Rows and columns of a tile."""
    (_, length, _, size), slots = parts[0].q_BLHK.shape, parts[0].k_BSGK.shape[1]
    largest = plans.largest(size, parts[0].k_BSGK.dtype)
    mapped = [part.blocks for part in parts if part.blocks is not None]
    largest = (maps.side(mapped, min(largest)),) * 2 if mapped else largest
    return plans.block(length, largest[0]), plans.block(slots, largest[1])


def fits(parts: tuple[Part, ...]) -> bool:
    """Whether block maps, where there are any, fit in scalar memory: if not `attend` refuses."""
    if all(part.blocks is None for part in parts):
        return True
    (batch, length, _, _), slots = parts[0].q_BLHK.shape, parts[0].k_BSGK.shape[1]
    try:
        sides = _sides(parts)
        counts = -(-length // sides[0]), -(-slots // sides[1])
        band = reaches(tuple(p.mask for p in parts)) if length == slots else (None, None)
        near = tiles.inside(band, *counts, *sides)
        _room(parts, near, tuple(_listed(p, near, sides)[0] for p in parts), sides).check(batch)
    except ValueError:
        return False
    return True


def _stacked(known: list[Array], block: int) -> Array:
    """int32 `[B, rows, L]` in whole blocks; rows in eights, which a kernel can transpose."""
    known = jnp.stack([jnp.asarray(x, jnp.int32) for x in known], 1)
    _, rows, length = known.shape
    return jnp.pad(known, ((0, 0), (0, -rows % 8), (0, -length % block)))


def _numbers(parts: tuple[Part, ...], mods: tuple, heads: int) -> tuple[Array, Array, Array]:
    """Integers and floats of all modifications, all heads of one together, and tables `[H, 1, N]`.

    Never an empty array.
    """
    integers, floats, tables = [], [], []
    for part, mod in zip(parts, mods, strict=True):
        if mod is not None:
            leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(part.score_mod)]
            cross = functools.partial(mod.for_head((8, 1), (1, LANES)).cross, *leaves)
            numbers, own = jax.vmap(cross)(jnp.arange(heads, dtype=jnp.int32))
            for x in numbers:
                (floats if is_floating(x) else integers).append(x.reshape(heads))
            tables += own
    integers = [x.astype(jnp.int32) for x in integers] or [jnp.zeros(1, jnp.int32)]
    floats = [x.astype(jnp.float32) for x in floats] or [jnp.zeros(1)]
    tables = tables or [jnp.zeros((heads, 1, LANES))]
    return jnp.concatenate(integers), jnp.concatenate(floats), jnp.concatenate(tables, -1)


def _padded(x: Array, block: int) -> Array:
    """Axis 1 padded with zeros to a multiple of the block."""
    missing = -x.shape[1] % block
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def _wide(x: Array, size: int) -> Array:
    """The last axis padded with zeros to a size."""
    missing = size - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x
