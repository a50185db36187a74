"""Softplus attention with re-weighting (LSSAR, arXiv:2501.13428); see `Softplus` for equations.

A row needs its sum before any of its powers, so it is no merge of partial softmaxes. Here a block
of queries meets all keys at once: dense attention is one block, and with block maps memory grows
with length only, as blocks have few enough queries and their weights are computed again in the
backward pass. Without maps `softplus_blockwise` goes twice over tiles.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lcm.ops.attention import softplus_blockwise
from lcm.ops.attention.part import Part
from lcm.ops.attention.reference import scores
from lcm.ops.attention.softplus_blockwise import FLAT
from lcm.types import Array, Context, Queries, Values

SCORES = 1 << 20  # of a block of queries, for each head of each row of the batch


def dense(
    parts: tuple[Part, ...],
    v_BSGK: Values,
    q_context: Context,
    k_context: Context,
    power: float | None,
) -> Queries:
    """All queries at once."""
    parts = tuple(_on_sphere(part) for part in parts)
    slots = jnp.arange(parts[0].q_BLHK.shape[1])
    return _rows(parts, v_BSGK, q_context, k_context, slots, power)


def blockwise(
    parts: tuple[Part, ...],
    v_BSGK: Values,
    q_context: Context,
    k_context: Context,
    power: float | None,
) -> Queries:
    """Tiles, in two passes over the keys; with block maps, blocks of queries with all keys."""
    if all(part.blocks is None for part in parts):
        parts = tuple(_on_sphere(part) for part in parts)
        return softplus_blockwise.attend(parts, v_BSGK, q_context, k_context, power)
    return _by_rows(parts, v_BSGK, q_context, k_context, power)


def _by_rows(
    parts: tuple[Part, ...],
    v_BSGK: Values,
    q_context: Context,
    k_context: Context,
    power: float | None,
) -> Queries:
    """Blocks of queries one after the other, each with all keys."""
    batch, length = parts[0].q_BLHK.shape[:2]
    rows = min(length, max(1, SCORES // v_BSGK.shape[1]))
    parts = tuple(_on_sphere(part) for part in parts)

    def blocks(x: Array) -> Array:
        """`[B, L, ...]` as `[blocks, B, rows, ...]`; padding has segment 0 and sees nothing."""
        x = jnp.pad(x, [(0, 0), (0, -length % rows)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, rows, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def block(own: tuple) -> Array:
        queries, where, slots = own
        given = zip(parts, queries, strict=True)
        given = tuple(dataclasses.replace(part, q_BLHK=q) for part, q in given)
        return _rows(given, v_BSGK, where, k_context, slots, power)

    queries = tuple(blocks(part.q_BLHK) for part in parts)
    slots = jnp.minimum(jnp.arange(queries[0].shape[0] * rows), length - 1).reshape(-1, rows)
    out = jax.lax.map(block, (queries, jax.tree.map(blocks, q_context), slots))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])[:, :length]


def _rows(
    parts: tuple[Part, ...],
    v_BSGK: Array,
    q_context: Context,
    k_context: Context,
    q_slots: Array,
    power: float | None,
) -> Array:
    """Attention of the queries at `q_slots`, which are of length 1, as the keys are."""
    batch, length, heads, size = parts[0].q_BLHK.shape
    slots, kv_heads = v_BSGK.shape[1:3]
    seen = [part.sees(q_context, k_context, q_slots) for part in parts]
    count = sum(s.sum(-1, keepdims=True, dtype=jnp.float32) for s in seen)
    scale = jnp.log(float(size)) * jnp.log(jnp.maximum(count, 1.0))
    weights = [
        jnp.where(s, jax.nn.softplus(scores(part, q_context, k_context, scale)), 0.0)
        for part, s in zip(parts, seen, strict=True)
    ]
    weights = _over_sum(weights)
    if power is not None:
        weights = _reweighted(weights, count, power)
    v = v_BSGK.transpose(0, 2, 1, 3)
    rows = [w.astype(v.dtype).reshape(batch, kv_heads, -1, slots) for w in weights]
    out = sum(jnp.einsum("bgms,bgsk->bgmk", w, v, preferred_element_type=jnp.float32) for w in rows)
    return out.reshape(batch, heads, length, -1).transpose(0, 2, 1, 3).astype(v.dtype)


def _reweighted(weights: list[Array], count: Array, power: float) -> list[Array]:
    """`relu(N A - O)^power` over its sum, divided by the largest before the power can overflow."""
    excess = [jax.nn.relu(count * w - (count > 3)) for w in weights]
    top = functools.reduce(jnp.maximum, [e.max(-1, keepdims=True) for e in excess])
    flat = top <= FLAT
    top = jax.lax.stop_gradient(jnp.where(flat, 1.0, top))
    powers = _over_sum([(e / top) ** power for e in excess])
    return [jnp.where(flat, w, p) for w, p in zip(weights, powers, strict=True)]


def _over_sum(weights: list[Array]) -> list[Array]:
    """Weights that sum to 1, or are all 0; the square of a sum is in gradients, so none is tiny."""
    top = functools.reduce(jnp.maximum, [w.max(-1, keepdims=True) for w in weights])
    top = jax.lax.stop_gradient(jnp.where(top > 0, top, 1.0))
    weights = [w / top for w in weights]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    return [w / jnp.where(total > 0, total, 1.0) for w in weights]


def _on_sphere(part: Part) -> Part:
    """The part with queries and keys of length 1."""

    def unit(x: Array) -> Array:
        wide = x.astype(jnp.float32)
        length = jnp.square(wide).sum(-1, keepdims=True)
        return (wide * jax.lax.rsqrt(length + 1e-12)).astype(x.dtype)

    return dataclasses.replace(part, q_BLHK=unit(part.q_BLHK), k_BSGK=unit(part.k_BSGK))
