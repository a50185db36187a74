"""Random logits, and what one batch of requests makes of them."""

import jax
import numpy as np

from lcm.decoding import begin, chain, observe, plan, process

CAPACITY = 64


def logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * scale).astype(np.float32)


watch = jax.jit(observe)


@jax.jit
def _processed(chain_, history, logits_RV):
    return process(chain_, history, logits_RV)[1]


def processed(settings, logits_RV, prompts=None, generated=()) -> np.ndarray:
    """Logits of rows through their chain, when each row has generated these tokens."""
    shape = plan(settings, logits_RV.shape[1], CAPACITY)
    history = begin(settings, prompts or [[]] * len(settings), shape)
    for token in generated:
        history = watch(history, np.full(len(settings), token), np.ones(len(settings), bool))
    return np.asarray(_processed(chain(settings, shape), history, logits_RV))


def kept(settings, logits_RV) -> np.ndarray:
    return np.isfinite(processed(settings, logits_RV))
