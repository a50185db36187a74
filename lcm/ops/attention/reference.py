"""Dense attention, to be read: the definition that every other backend is tested against."""

import jax
import jax.numpy as jnp

from lcm.ops.attention.part import Part, Partial
from lcm.types import Array, Context, Values


def attend(
    parts: tuple[Part, ...], v_BSGK: Values, q_context: Context, k_context: Context, scale: float
) -> Partial:
    """One softmax over the scores of all parts, and the logarithm of its denominator."""
    batch, length, heads, _ = parts[0].q_BLHK.shape
    slots, kv_heads = v_BSGK.shape[1:3]
    seen = [part.sees(q_context, k_context, jnp.arange(length)) for part in parts]
    found = [
        jnp.where(s, scores(part, q_context, k_context, scale), -jnp.inf)
        for part, s in zip(parts, seen, strict=True)
    ]
    tops = jnp.concatenate([s.max(-1, keepdims=True) for s in found], -1)
    top = tops.max(-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = [jnp.exp(s - top) for s in found]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
    v = v_BSGK.transpose(0, 2, 1, 3)
    out = 0.0
    for w in weights:
        rows = w.astype(v.dtype).reshape(batch, kv_heads, -1, slots)
        out = out + jnp.einsum("bgms,bgsk->bgmk", rows, v, preferred_element_type=jnp.float32)
    out = out.reshape(batch, heads, length, -1) / total
    return Partial(out.transpose(0, 2, 1, 3).astype(v.dtype), lse[..., 0].transpose(0, 2, 1))


def scores(part: Part, q_context: Context, k_context: Context, scale: float | Array) -> Array:
    """float32 scores `[B, H, L, S]` of one part, whether its mask shows the key or not.

    A scale that is an array, `[B, H or 1, L, 1]`, differs from row to row.
    """
    batch, length, heads, size = part.q_BLHK.shape
    slots, kv_heads = part.k_BSGK.shape[1:3]
    q = part.q_BLHK.transpose(0, 2, 1, 3)
    q = (q * scale).astype(q.dtype).reshape(batch, kv_heads, -1, size)
    k = part.k_BSGK.transpose(0, 2, 1, 3)
    score = jnp.einsum("bgmk,bgsk->bgms", q, k, preferred_element_type=jnp.float32)
    score = score.reshape(batch, heads, length, slots)
    if part.score_mod is None:
        return score
    q_pos = q_context.positions_BL[:, None, :, None]
    k_pos = k_context.positions_BL[:, None, None, :]
    return part.score_mod(score, q_pos, k_pos, jnp.arange(heads)[:, None, None])
