"""Tiny models, requests to them, and what a whole forward pass says of what was generated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lcm import config, models
from lcm.decoding import Request, Sampling
from lcm.pretrained import Model
from lcm.types import Context

VOCAB, TRAINED = 40, 32
SIZES = ["model.width=32", "model.hidden=48", "model.heads=4", "model.kv_heads=2"]


@functools.cache
def model(*assignments: str) -> Model:
    """A model with fresh weights, whose attention is sharp enough to tell keys apart."""
    cfg = config.override(
        config.shrink(config.base()), [*SIZES, f"model.vocab={VOCAB}", *assignments]
    )
    params = models.init(cfg, jax.random.key(0))
    for layer in params["layers"].values():
        for name in ("q", "k"):
            layer["mixer"][name] = layer["mixer"][name] * 3
    return Model(cfg, params, None, 0)


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, count).astype(np.int32)


def request(count: int, new: int, seed: int = 0, **sampling) -> Request:
    """A prompt of so many random tokens; greedy by default."""
    settings = Sampling(**{"max_new_tokens": new, "temperature": 0.0, "seed": seed, **sampling})
    return Request(tokens(count, seed), settings)


def run(engine, requests) -> list[list]:
    """The events of each request."""
    events = [[] for _ in requests]
    for event in engine.run(requests):
        events[event.request].append(event)
    assert all([e.finish != "" for e in own] == [False] * (len(own) - 1) + [True] for own in events)
    return events


def written(events) -> list[list[int]]:
    return [[event.token for event in own] for own in events]


def logprobs(model: Model, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Log-probabilities `[n, V]` behind each place, of one pass over whole rows without a cache."""
    length = -(-max(map(len, rows)) // 64) * 64
    padded = np.stack([np.pad(row, (0, length - len(row))) for row in rows])
    there = np.stack([np.arange(length) < len(row) for row in rows]).astype(np.int32)
    at = models.default_context(padded.shape)
    at = Context(at.positions_BL, jnp.asarray(there), at.remaining_BL)
    logits, _ = models.apply(model.cfg, model.params, jnp.asarray(padded), at)
    found = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    return [found[i, : len(row)] for i, row in enumerate(rows)]


def assert_model_says_so(model: Model, requests, events, atol: float = 1e-4) -> None:
    """Each token has the log-probability that a whole pass gives it, and is the best if greedy.

    By induction over the tokens that is a naive loop of whole passes, up to ties.
    """
    rows = [
        np.concatenate([r.prompt, [e.token for e in own][:-1]]).astype(np.int32)
        for r, own in zip(requests, events, strict=True)
    ]
    for request, own, found in zip(requests, events, logprobs(model, rows), strict=True):
        assert len(own) == request.sampling.max_new_tokens
        for event, wanted in zip(own, found[request.read :], strict=True):
            np.testing.assert_allclose(event.raw_logprob, wanted[event.token], atol=atol)
            if request.sampling.temperature == 0:
                assert wanted[event.token] >= wanted.max() - atol
