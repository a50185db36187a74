"""Attention block by block: an online softmax whose backward pass computes each tile again.

Memory grows with L + S, never with L S (Milakov and Gimelshein, arXiv:1805.02867; Rabe and Staats,
arXiv:2112.05682; Dao et al., arXiv:2205.14135). A tile is a block of queries by a span of keys,
`[B, G, R, C, S]` for R = H/G query heads that share a key head.

    forward     m = max_j s_j,  l = sum_j exp(s_j - m),  o = sum_j exp(s_j - m) v_j / l
    kept        q, k, v, o and lse = m + log l
    backward    p = exp(s - lse),  dv = p^T do,  ds = p (do v^T - sum_k do o + dlse)
                dq = ds k,  dk = ds^T q

Where queries and keys are the same tokens, spans of keys that the mask hides from the whole block
are skipped by their index. Where they are not, as with a cache, and where there are several parts,
tiles that show nothing are found by their positions and segments, and skipped part by part.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcm.ops.attention.mask import Mask
from lcm.ops.attention.part import Part, Partial
from lcm.ops.attention.score import Leaves, split
from lcm.ops.recompute import after
from lcm.types import Array, Context, Values

# Largest block of queries and largest span of keys, where they are looped over.
QUERIES, KEYS = 256, 512
# Up to SHORT tokens there are no loops: blocks of SMALL queries are written out, each with one span
# of keys that ends where the mask does. On a CPU that is faster, and beyond it takes more memory.
SHORT, SMALL = 768, 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known before tracing; `skip` is the range of `k - q` indices that is ever visible."""

    masks: tuple[Mask, ...]
    mods: Leaves
    queries: int
    keys: int
    slots: int
    looped: bool
    skip: tuple[int | None, int | None]


class Inputs(NamedTuple):
    """Arrays padded to whole blocks: queries `[B, G, R, L, K]`, keys and values `[B, G, S, K]`."""

    q: tuple[Array, ...]
    k: tuple[Array, ...]
    v: Array
    weights: tuple[Array, ...]


class Places(NamedTuple):
    """Positions and segments of queries and keys, and leaves of score modifications of integers."""

    q_pos: Array
    q_seg: Array
    k_pos: Array
    k_seg: Array
    constants: tuple[Array, ...]


Weigh = Callable[[Array, Array, Array], tuple[Array, Array]]


def attend(
    parts: tuple[Part, ...],
    v_BSGK: Values,
    q_context: Context,
    k_context: Context,
    scale: float,
    known: Partial | None = None,
) -> Partial:
    """One softmax over the scores of all parts, and the logarithm of its denominator.

    If `q_context is k_context`, positions must increase from token to token within a segment, as
    in packed rows: then a key is never nearer in position than it is by index.

    known: the result over these keys and others. It is given back, and its gradient goes to these.
    """
    length = parts[0].q_BLHK.shape[1]
    plan, inputs, places = arranged(parts, v_BSGK, q_context, k_context, scale)
    if known is None:
        out, lse = _attention(plan, inputs, places)
    else:
        out, lse = _known(plan, inputs, places, Partial(*(_padded(x, plan.queries) for x in known)))
    return Partial(out[:, :length], lse[:, :length])


def arranged(
    parts: tuple[Part, ...],
    v_BSGK: Values,
    q_context: Context,
    k_context: Context,
    scale: float,
) -> tuple[Plan, Inputs, Places]:
    """Arguments in blocks, and how to loop over them."""
    batch, length, heads, size = parts[0].q_BLHK.shape
    slots, kv_heads = v_BSGK.shape[1:3]
    looped = max(length, slots) > SHORT
    queries = _block(length, QUERIES if looped else SMALL)
    keys = _block(slots, KEYS) if looped else slots
    mods, weights, constants = split(tuple(part.score_mod for part in parts))
    masks = tuple(part.mask for part in parts)
    skip = _union(masks) if q_context is k_context else (None, None)
    plan = Plan(masks, mods, queries, keys, slots, looped, skip)

    def query_blocks(q_BLHK: Array) -> Array:
        q = _padded(q_BLHK * scale, queries).reshape(batch, -1, kv_heads, heads // kv_heads, size)
        return q.transpose(0, 2, 3, 1, 4)

    def key_blocks(k_BSGK: Array) -> Array:
        return _padded(k_BSGK, keys).transpose(0, 2, 1, 3)

    inputs = Inputs(
        tuple(query_blocks(part.q_BLHK) for part in parts),
        tuple(key_blocks(part.k_BSGK) for part in parts),
        key_blocks(v_BSGK),
        weights,
    )
    k_seg = jnp.where(k_context.segments_BL > 0, k_context.segments_BL, -1)  # never a query's
    places = Places(
        _padded(q_context.positions_BL, queries),
        _padded(q_context.segments_BL, queries),
        _padded(k_context.positions_BL, keys),
        _padded(k_seg, keys, -1),
        constants,
    )
    return plan, inputs, places


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, inputs: Inputs, places: Places) -> Partial:
    return _forward(plan, inputs, places)[0]


def _forward(plan: Plan, inputs: Inputs, places: Places) -> tuple[Partial, Any]:
    batch, kv_heads, shared, length, _ = inputs.q[0].shape

    def block(i: int | Array, _: None) -> tuple[None, tuple[Array, Array]]:
        rows = (batch, kv_heads, shared, plan.queries)

        def tile(n: int, start: int | Array, width: int, carry: tuple) -> tuple:
            top, total, out = carry
            raw, mod, seen = score_tile(plan, inputs, places, n, i, start, width)
            score = jnp.where(seen, mod(raw, inputs.weights), -jnp.inf)
            highest = jnp.maximum(score.max(-1), top)
            finite = jnp.where(highest > -jnp.inf, highest, 0.0)
            weights, fade = jnp.exp(score - finite[..., None]), jnp.exp(top - finite)
            v = cut(inputs.v, start, width, 2)
            added = dot("bgms,bgsk->bgmk", flat_rows(weights, v), v).reshape(out.shape)
            return highest, total * fade + weights.sum(-1), out * fade[..., None] + added

        empty = jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((*rows, inputs.v.shape[-1]))
        top, total, out = over_keys(plan, i, by_part(plan, places, i, tile), empty)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
        out = out / total[..., None]
        # [B, C, G, R, K]: the layout of the result, so that only one copy of it is kept
        return None, (
            out.transpose(0, 3, 1, 2, 4).astype(inputs.v.dtype),
            lse.transpose(0, 3, 1, 2),
        )

    _, (out, lse) = over_queries(plan, block, None, length)
    out = jnp.moveaxis(out, 0, 1).reshape(batch, length, kv_heads * shared, -1)
    lse = jnp.moveaxis(lse, 0, 1).reshape(batch, length, kv_heads * shared)
    return Partial(out, lse), (inputs, places, out, lse)


def _backward(plan: Plan, kept: tuple, d: Partial) -> tuple[Inputs, None]:
    inputs, places, out, lse = kept
    d_out, d_lse = d
    some = lse > -jnp.inf
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    delta = delta - jnp.where(some, d_lse, 0.0)
    delta, lse = (in_groups(x[..., None], inputs) for x in (delta, jnp.where(some, lse, 0)))

    def weigh(i: int | Array) -> Weigh:
        delta_rows, lse_rows = (cut(x, i * plan.queries, plan.queries, 3) for x in (delta, lse))

        def tile(score: Array, seen: Array, d_p: Array) -> tuple[Array, Array]:
            p = jnp.exp(jnp.where(seen, score, -jnp.inf) - lse_rows)
            return p, p * (d_p - delta_rows)

        return tile

    return gradients(plan, inputs, places, d_out, weigh), None


def in_groups(x_BLHX: Array, inputs: Inputs) -> Array:
    """`[B, G, R, L, X]`, as queries are."""
    batch, kv_heads, shared, length, _ = inputs.q[0].shape
    return x_BLHX.reshape(batch, length, kv_heads, shared, -1).transpose(0, 2, 3, 1, 4)


def gradients(
    plan: Plan, inputs: Inputs, places: Places, d_out: Array, weigh: Callable[[Any], Weigh]
) -> Inputs:
    """Those of all inputs, by computing each tile again.

    `weigh(i)` is for block i the function of a tile's modified scores, of what it sees and of
    `do v^T`, to its weights and the gradient of its scores.
    """
    inputs = inputs._replace(q=tuple(after(q, d_out) for q in inputs.q))
    batch, kv_heads, _, length, _ = inputs.q[0].shape
    d_out = in_groups(d_out, inputs)

    def block(i: int | Array, carry: tuple) -> tuple[tuple, tuple[Array, ...]]:
        own = lambda x: cut(x, i * plan.queries, plan.queries, 3)  # noqa: E731
        d_rows, q, of_tile = own(d_out), [own(q) for q in inputs.q], weigh(i)
        d_rows = d_rows.reshape(batch, kv_heads, -1, d_rows.shape[-1])

        def tile(n: int, start: int | Array, width: int, carry: tuple) -> tuple:
            d_q, d_k, d_v, d_weights = carry
            v = cut(inputs.v, start, width, 2)
            d_p = dot("bgmk,bgsk->bgms", d_rows, v)
            raw, mod, seen = score_tile(plan, inputs, places, n, i, start, width)
            score, pull = jax.vjp(mod, raw, inputs.weights)
            p, d_score = of_tile(score, seen, d_p.reshape(score.shape))
            d_raw, d_own = pull(d_score)
            # Gradients of keys and values as [K, S]: the faster of the two matmuls on a CPU
            d_v = _added(d_v, dot("bgmk,bgms->bgks", d_rows, flat_rows(p, v)), start)
            k = cut(inputs.k[n], start, width, 2)
            d_raw = flat_rows(d_raw, k)
            rows = q[n].reshape(batch, kv_heads, -1, q[n].shape[-1])
            d_k = _put(d_k, n, _added(d_k[n], dot("bgmk,bgms->bgks", rows, d_raw), start))
            d_q = _put(d_q, n, d_q[n] + dot("bgms,bgsk->bgmk", d_raw, k).reshape(q[n].shape))
            return d_q, d_k, d_v, tuple(map(jnp.add, d_weights, d_own))

        d_q = tuple(jnp.zeros(part.shape, jnp.float32) for part in q)
        d_q, *carry = over_keys(plan, i, by_part(plan, places, i, tile), (d_q, *carry))
        return tuple(carry), tuple(d.astype(part.dtype) for d, part in zip(d_q, q, strict=True))

    transposed = lambda x: jnp.zeros(x.swapaxes(2, 3).shape, jnp.float32)  # noqa: E731
    empty = tuple(map(transposed, inputs.k)), transposed(inputs.v)
    empty = *empty, tuple(map(jnp.zeros_like, inputs.weights))
    (d_k, d_v, d_weights), d_q = over_queries(plan, block, empty, length)
    back = lambda d, x: d.swapaxes(2, 3).astype(x.dtype)  # noqa: E731
    d_q = tuple(jnp.moveaxis(d, 0, 3).reshape(q.shape) for d, q in zip(d_q, inputs.q, strict=True))
    return Inputs(d_q, tuple(map(back, d_k, inputs.k)), back(d_v, inputs.v), d_weights)


_attention.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _known(plan: Plan, inputs: Inputs, places: Places, result: Partial) -> Partial:
    return result


_known.defvjp(
    lambda plan, inputs, places, result: (result, (inputs, places, *result)),
    lambda plan, kept, d: (*_backward(plan, kept, d), None),
)


def score_tile(
    plan: Plan,
    inputs: Inputs,
    places: Places,
    n: int,
    i: int | Array,
    start: int | Array,
    width: int,
) -> tuple[Array, Callable[[Array, tuple], Array], Array]:
    """Scores of part `n` before modification, the modification, and the visible places."""
    at = i * plan.queries
    q = cut(inputs.q[n], at, plan.queries, 3)
    k = cut(inputs.k[n], start, width, 2)
    raw = dot("bgmk,bgsk->bgms", q.reshape(*q.shape[:2], -1, q.shape[-1]), k)
    q_pos, k_pos, seen = seen_tile(plan, places, n, i, start, width)
    head = jnp.arange(q.shape[1] * q.shape[2]).reshape(1, q.shape[1], q.shape[2], 1, 1)

    def mod(score: Array, weights: tuple[Array, ...]) -> Array:
        own = plan.mods.join(weights, places.constants)[n]
        return score if own is None else own(score, q_pos, k_pos, head)

    return raw.reshape(*q.shape[:4], width), mod, seen


def seen_tile(
    plan: Plan, places: Places, n: int, i: int | Array, start: int | Array, width: int
) -> tuple[Array, Array, Array]:
    """Positions of queries and keys of a tile, and which of them part `n` shows to each other."""
    at = i * plan.queries
    q_pos, q_seg = (cut(x, at, plan.queries, 1)[:, None, None, :, None] for x in places[:2])
    k_pos, k_seg = (cut(x, start, width, 1)[:, None, None, None] for x in places[2:4])
    return q_pos, k_pos, (q_seg == k_seg) & plan.masks[n].shows(q_pos, k_pos)


def by_part(plan: Plan, places: Places, i: int | Array, tile: Callable) -> Callable:
    """`span(start, width, carry)`: `tile(n, start, width, carry)` of one part n after the other.

    In loops, parts that show block `i` nothing of the span are left out, unless there is one part
    and its spans have been chosen by index.
    """
    count = len(plan.masks)
    sure = not plan.looped or (count == 1 and plan.skip != (None, None))

    def span(start: int | Array, width: int, carry: Any) -> Any:
        for n in range(count):
            own = functools.partial(tile, n, start, width)
            if sure:
                carry = own(carry)
            else:
                _, _, seen = seen_tile(plan, places, n, i, start, width)
                carry = jax.lax.cond(seen.any(), own, lambda carry: carry, carry)
        return carry

    return span


def over_queries(
    plan: Plan, block: Callable[[Any, Any], tuple], carry: Any, length: int
) -> tuple[Any, Any]:
    """`jax.lax.scan` over block numbers, or written out with Python integers."""
    count = length // plan.queries
    if plan.looped:
        return jax.lax.scan(lambda carry, i: block(i, carry), carry, jnp.arange(count))
    results = []
    for i in range(count):
        carry, result = block(i, carry)
        results.append(result)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *results)


def over_keys(plan: Plan, i: int | Array, span: Callable, carry: Any) -> Any:
    """`carry = span(start, width, carry)` over the spans of keys that block `i` may see."""
    below, above = plan.skip
    pick = (jnp.maximum, jnp.minimum) if plan.looped else (max, min)
    first = 0 if below is None else pick[0](0, i * plan.queries + below)
    stop = plan.slots if above is None else pick[1](plan.slots, (i + 1) * plan.queries + above)
    if not plan.looped:
        return span(first, stop - first, carry) if first < stop else carry
    if None not in plan.skip:
        count = -(-(plan.queries + above - below) // plan.keys)
        width = -(-(plan.queries + above - below) // count)
        if count * width <= plan.slots:  # for every block as many keys, from where its reach begins
            first = jnp.clip(first, 0, plan.slots - count * width)
            step = lambda j, carry: span(first + j * width, width, carry)  # noqa: E731
            return jax.lax.fori_loop(0, count, step, carry)
    blocks = first // plan.keys, -(-stop // plan.keys)
    return jax.lax.fori_loop(*blocks, lambda j, c: span(j * plan.keys, plan.keys, c), carry)


def _union(masks: tuple[Mask, ...]) -> tuple[int | None, int | None]:
    """The range of `k - q` indices outside which no mask shows a key."""
    below, above = zip(*(mask.reach() for mask in masks), strict=True)
    return (None if None in below else min(below)), (None if None in above else max(above))


def _block(length: int, largest: int) -> int:
    """The size of equal blocks of at most `largest` that pad a length the least."""
    return math.ceil(length / math.ceil(length / largest))


def _padded(x: Array, block: int, fill: int = 0) -> Array:
    """Axis 1 padded to a multiple of the block."""
    missing = -x.shape[1] % block
    if not missing:
        return x
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)


def cut(x: Array, start: int | Array, width: int, axis: int) -> Array:
    """`width` places of an axis, from `start` on."""
    return x if width == x.shape[axis] else jax.lax.dynamic_slice_in_dim(x, start, width, axis)


def _added(total: Array, tile: Array, start: int | Array) -> Array:
    """`total` with a tile added to its last axis from `start` on."""
    if tile.shape == total.shape:
        return total + tile
    tile = tile + cut(total, start, tile.shape[-1], 3)
    return jax.lax.dynamic_update_slice_in_dim(total, tile, start, 3)


def _put(items: tuple, n: int, item: Any) -> tuple:
    return (*items[:n], item, *items[n + 1 :])


def flat_rows(tile: Array, like: Array) -> Array:
    """`[B, G, R C, S]` in the dtype of the other side of a matmul."""
    return tile.reshape(*tile.shape[:2], -1, tile.shape[-1]).astype(like.dtype)


def dot(spec: str, a: Array, b: Array) -> Array:
    """An einsum with float32 sums."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
