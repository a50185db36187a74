"""Losses over tokens, in float32 whatever the model computes in."""

import jax
import jax.numpy as jnp

from lcm.types import Array, Logits, Tokens


def cross_entropy(logits_BLV: Logits, targets_BL: Tokens) -> tuple[Array, Array]:
    """Negative log-likelihood in nats and log-normaliser, float32 `[B, L]` each.

    The second is what z-loss acts on: `coefficient * log_z ** 2` keeps it near zero (PaLM,
    arXiv:2204.02311, section 5).
    """
    logits = logits_BLV.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets_BL[..., None], axis=-1)[..., 0]
    return log_z - chosen, log_z
