"""Draws of tokens: Gumbel noise of each request's own, and the largest sum."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcm.decoding.history import History
from lcm.decoding.processors import Chain, largest, process
from lcm.decoding.settings import Plan, Sampling
from lcm.types import Array


class Drawn(NamedTuple):
    """One token per row, `[R]` each.

    logprob: of the token under the distribution it was drawn from, 0 where that is greedy.
    raw_logprob: under the model's own, before any processor.
    """

    token_R: Array
    logprob_R: Array
    raw_logprob_R: Array


def keys(settings: Sequence[Sampling], plan: Plan) -> Array | None:
    """A random key per request, `[R]`, of its seed alone; None where no row of the plan draws."""
    if plan.greedy:
        return None
    return jax.vmap(jax.random.key)(jnp.asarray([s.seed for s in settings], jnp.uint32))


def sample(
    chain: Chain, key_R: Array | None, history: History, logits_RV: Array
) -> tuple[History, Drawn]:
    """Logits of the model to tokens; the history has not observed these yet.

    The noise of a token is of its request's seed and of the number of tokens generated before it,
    so what a request draws does not depend on the batch or the row that it is in.
    """
    history, processed_RV = process(chain, history, logits_RV)
    if key_R is not None:
        key_R = jax.vmap(jax.random.fold_in)(key_R, history.new_R)
    token_R, logprob_R = draw(key_R, processed_RV)
    return history, Drawn(token_R, logprob_R, logprob(logits_RV.astype(jnp.float32), token_R))


def draw(key_R: Array | None, logits_RV: Array) -> tuple[Array, Array]:
    """Tokens int32 `[R]`, each `argmax(logits + Gumbel noise)`, and their log-probabilities.

    Without keys, the largest logits, the first one on ties, with probability one. The noise has the
    tail that large vocabularies need: from 23 random bits alone, the largest of 256k values
    would be one of some dozens.
    """
    if key_R is None:
        token_R = largest(logits_RV)
        return token_R, jnp.zeros(len(token_R), jnp.float32)
    size = logits_RV.shape[1:]
    noise_RV = jax.vmap(lambda key: jax.random.gumbel(key, size, jnp.float32, mode="high"))(key_R)
    token_R = largest(logits_RV + noise_RV)
    return token_R, logprob(logits_RV, token_R)


def logprob(logits_RV: Array, token_R: Array) -> Array:
    """Log-probability of one token per row, `[R]`."""
    picked_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=1)[:, 0]
    return picked_R - jax.nn.logsumexp(logits_RV, axis=1)
