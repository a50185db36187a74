"""The loss that brings vectors of pairs together: InfoNCE of cosines (arXiv:1807.03748)."""

import jax
import jax.numpy as jnp

from lcm.types import Array


def unit(x: Array) -> Array:
    """Vectors of length 1, float32, along the last axis; the zero vector stays."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.maximum((wide * wide).sum(-1, keepdims=True), 1e-12))


def info_nce(
    q_BD: Array, p_BD: Array, hard_BMD: Array | None = None, *, temperature: float = 0.01
) -> Array:
    """`-log softmax` of the cosine of each query and its passage, over all passages, `[B]`.

    Passage i is query i's; the passages of other queries are negatives, and so are M hard negatives
    of each, for the others too. Under jit on a mesh the batch is that of all devices.

    Raises:
        ValueError: for a temperature that is not more than 0, or vectors of other shapes.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be more than 0: 0.01 is customary")
    hard = () if hard_BMD is None else jnp.shape(hard_BMD)
    if q_BD.shape != p_BD.shape or (hard and (hard[0], *hard[2:]) != q_BD.shape):
        raise ValueError(
            f"queries {q_BD.shape}, passages {p_BD.shape}, hard negatives {hard or 'none'}: "
            "give [B, D], [B, D] and [B, M, D]"
        )
    passages = p_BD if hard_BMD is None else jnp.concatenate([p_BD, hard_BMD.reshape(-1, hard[2])])
    scores = unit(q_BD) @ unit(passages).T / temperature
    return jax.nn.logsumexp(scores, axis=-1) - jnp.diagonal(scores)
