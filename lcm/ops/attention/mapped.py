"""Attention through a block map: each block of queries meets the key blocks that it lists.

    row i     K_i, V_i = the N key blocks that query block i lists, gathered
              out, lse = softmax attention of Q_i over K_i, V_i
    backward  the row again, differentiated; gradients of K_i, V_i are added where they came from

Work is Q N blocks of size^2 and memory that of one row beyond the arguments, so both grow with
length where N does not (Zaheer et al., arXiv:2007.14062). Parts without a map, and rows that see
every block, are `blockwise`; partial results are merged.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm.ops.attention import blockwise
from lcm.ops.attention.mask import Mask
from lcm.ops.attention.part import Part, Partial, merge
from lcm.ops.attention.score import Leaves, split
from lcm.types import Array, Context, Values


def attend(
    parts: tuple[Part, ...], v_BSGK: Values, q_context: Context, k_context: Context, scale: float
) -> Partial:
    """Parts with a map by their lists, the others together block by block."""
    arguments = v_BSGK, q_context, k_context, scale
    plain = tuple(part for part in parts if part.blocks is None)
    partials = [_through_map(part, *arguments) for part in parts if part.blocks is not None]
    if plain:
        partials.append(blockwise.attend(plain, *arguments))
    return merge(*partials)


@dataclasses.dataclass(frozen=True)
class _Plan:
    mask: Mask
    mods: Leaves


class _Inputs(NamedTuple):
    """Queries `[Q, B, G, R, C, K]`; keys and values in blocks, `[B, G, blocks, C, K]`."""

    q: Array
    k: Array
    v: Array
    weights: tuple[Array, ...]


class _Places(NamedTuple):
    """Positions and segments `[Q, B, C]` of queries, `[B, blocks, C]` of keys; listed `[Q, G, N]`.

    The heads of a map are groups G of heads with keys of their own; `owner` is the key head each
    reads from.
    """

    listed: Array
    q_pos: Array
    q_seg: Array
    k_pos: Array
    k_seg: Array
    owner: Array
    constants: tuple[Array, ...]


def _through_map(
    part: Part, v_BSGK: Array, q_context: Context, k_context: Context, scale: float
) -> Partial:
    batch, length, heads, _ = part.q_BLHK.shape
    kv_heads, size = v_BSGK.shape[2], part.blocks.size
    rows = -(-length // size)
    full = np.unique(np.asarray(part.blocks.full, np.int32))
    short = np.setdiff1d(np.arange(rows), full)
    groups = kv_heads if part.blocks.indices_HQN.shape[0] == 1 else heads

    def blocks(x: Array, fill: int = 0) -> Array:
        """Axis 1 as blocks of the map, `[B, blocks, C, ...]`."""
        missing = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, missing, constant_values=fill).reshape(batch, -1, size, *x.shape[2:])

    def some(x: Array, chosen: np.ndarray) -> Array:
        """Some of the blocks of queries, in a row."""
        return blocks(x)[:, chosen].reshape(batch, -1, *x.shape[2:])

    partials = []
    if short.size:
        mods, weights, constants = split(part.score_mod)
        q = blocks(part.q_BLHK * scale)[:, short]
        q = q.reshape(*q.shape[:3], groups, heads // groups, -1).transpose(1, 0, 3, 4, 2, 5)
        inputs = _Inputs(
            q, *(blocks(x).transpose(0, 3, 1, 2, 4) for x in (part.k_BSGK, v_BSGK)), weights
        )
        listed = part.blocks.indices_HQN[:, short].swapaxes(0, 1)
        places = _Places(
            jnp.broadcast_to(listed, (short.size, groups, listed.shape[-1])),
            blocks(q_context.positions_BL)[:, short].swapaxes(0, 1),
            blocks(q_context.segments_BL)[:, short].swapaxes(0, 1),
            blocks(k_context.positions_BL),
            blocks(jnp.where(k_context.segments_BL > 0, k_context.segments_BL, -1), -1),
            jnp.arange(groups) // (groups // kv_heads),
            constants,
        )
        out, lse = _attention(_Plan(part.mask, mods), inputs, places)
        partials.append((short, _joined(out, lse)))
    if full.size:
        whole = Part(some(part.q_BLHK, full), part.k_BSGK, part.mask, part.score_mod)
        where = jax.tree.map(lambda x: some(x, full), q_context)
        partials.append((full, blockwise.attend((whole,), v_BSGK, where, k_context, scale)))
    return _in_order(partials, rows, length)


def _joined(out: Array, lse: Array) -> Partial:
    """Rows `[Q, B, G, R, C, ...]` as `[B, L, H, ...]`."""
    rows, batch, groups, shared, size = lse.shape
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, rows * size, groups * shared, -1)
    return Partial(out, lse.transpose(1, 0, 4, 2, 3).reshape(out.shape[:3]))


def _in_order(partials: list[tuple[np.ndarray, Partial]], rows: int, length: int) -> Partial:
    """Partials for different blocks of queries as one, its queries in their order."""
    order = np.argsort(np.concatenate([at for at, _ in partials]))

    def join(*xs: Array) -> Array:
        x = xs[0] if len(xs) == 1 else jnp.concatenate(xs, axis=1)
        if len(xs) > 1:
            x = x.reshape(x.shape[0], rows, -1, *x.shape[2:])[:, order]
            x = x.reshape(x.shape[0], -1, *x.shape[3:])
        return x[:, :length]

    return jax.tree.map(join, *(partial for _, partial in partials))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, inputs: _Inputs, places: _Places) -> tuple[Array, Array]:
    return _forward(plan, inputs, places)[0]


def _forward(plan: _Plan, inputs: _Inputs, places: _Places) -> tuple[tuple[Array, Array], Any]:
    def row(_: None, own: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
        q, *at = own
        k, v = (_gathered(x, places.owner, at[0]) for x in (inputs.k, inputs.v))
        return None, _row(plan, q, k, v, inputs.weights, at, places)

    _, result = jax.lax.scan(row, None, (inputs.q, *places[:3]))
    return result, (inputs, places)


def _backward(plan: _Plan, kept: tuple, d: tuple[Array, Array]) -> tuple[_Inputs, None]:
    inputs, places = kept

    def row(carry: tuple, own: tuple) -> tuple[tuple, Array]:
        d_k, d_v, d_weights = carry
        d_row, q, *at = own
        k, v = (_gathered(x, places.owner, at[0]) for x in (inputs.k, inputs.v))
        _, pull = jax.vjp(lambda *given: _row(plan, *given, at, places), q, k, v, inputs.weights)
        d_q, d_own_k, d_own_v, d_own = pull(d_row)
        d_k = _added(d_k, places.owner, at[0], d_own_k)
        d_v = _added(d_v, places.owner, at[0], d_own_v)
        return (d_k, d_v, tuple(map(jnp.add, d_weights, d_own))), d_q

    empty = tuple(jnp.zeros(x.shape, jnp.float32) for x in (inputs.k, inputs.v))
    empty = *empty, tuple(map(jnp.zeros_like, inputs.weights))
    (d_k, d_v, d_weights), d_q = jax.lax.scan(row, empty, (d, inputs.q, *places[:3]))
    return _Inputs(d_q, d_k.astype(inputs.k.dtype), d_v.astype(inputs.v.dtype), d_weights), None


_attention.defvjp(_forward, _backward)


def _row(
    plan: _Plan, q: Array, k: Array, v: Array, weights: tuple, at: list[Array], places: _Places
) -> tuple[Array, Array]:
    """One block of queries `[B, G, R, C, K]` over its keys `[B, G, N C, K]`."""
    listed, q_pos, q_seg = at
    batch, groups, shared, size, _ = q.shape
    tile = (batch, groups, shared, size, -1)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    score = dot("bgmk,bgsk->bgms", q.reshape(batch, groups, shared * size, -1), k).reshape(tile)
    q_pos, q_seg = q_pos[:, None, None, :, None], q_seg[:, None, None, :, None]
    k_pos, k_seg = (
        x[:, listed].reshape(batch, groups, 1, 1, -1) for x in (places.k_pos, places.k_seg)
    )
    seen = (q_seg == k_seg) & plan.mask.shows(q_pos, k_pos)
    seen &= jnp.repeat(listed >= 0, size, axis=-1)[:, None, None]
    mod = plan.mods.join(weights, places.constants)
    if mod is not None:
        head = jnp.arange(groups * shared).reshape(groups, shared, 1, 1)
        score = mod(score, q_pos, k_pos, head)
    score = jnp.where(seen, score, -jnp.inf)
    top = jax.lax.stop_gradient(score.max(-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    p = jnp.exp(score - top)
    total = p.sum(-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    rows = p.astype(v.dtype).reshape(batch, groups, shared * size, -1)
    out = dot("bgms,bgsk->bgmk", rows, v).reshape(tile) / total
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
    return out.astype(v.dtype), lse[..., 0]


def _gathered(x: Array, owner: Array, listed: Array) -> Array:
    """Key blocks `[B, G, N C, K]` of each group, some block where none is listed."""
    tile = x[:, owner[:, None], jnp.maximum(listed, 0)]
    return tile.reshape(*tile.shape[:2], -1, tile.shape[-1])


def _added(total: Array, owner: Array, listed: Array, tile: Array) -> Array:
    """`total` with a gathered tile added where it came from."""
    tile = tile.reshape(*tile.shape[:2], -1, *total.shape[-2:]).astype(total.dtype)
    return total.at[:, owner[:, None], jnp.maximum(listed, 0)].add(tile)
