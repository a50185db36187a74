"""Random logits, and what one batch of requests makes of them."""

import functools

import jax
import numpy as np

from lcm.decoding import begin, chain, plan, process

CAPACITY = 64


def logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * scale).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _processed(_, chain_, history, logits_RV):
    return process(chain_, history, logits_RV)[1]


def processed(settings, logits_RV, prompts=None) -> np.ndarray:
    """Logits of fresh rows through their chain."""
    shape = plan(settings, logits_RV.shape[1], CAPACITY)
    prompts = [[]] * len(settings) if prompts is None else prompts
    history = begin(settings, prompts, shape)
    return np.asarray(_processed(shape, chain(settings, shape), history, logits_RV))


def kept(settings, logits_RV) -> np.ndarray:
    return np.isfinite(processed(settings, logits_RV))
