"""Log-probabilities of given tokens, without the logits of all the others.

The head is applied at the tokens that are asked about alone, some of them at a time, so that
neither a long row nor a large vocabulary ever needs `[B, L, V]`. Q tokens asked about, N of a row.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm import models
from lcm.models import ModelSpec, decoder
from lcm.types import Array, Context, Hidden, Tokens

LOGITS = 1 << 26  # at a time: of 1,365 tokens for a vocabulary of 49,152
LEAST = 64  # tokens of the shortest program; others are of powers of two and half-way between


class Ask(NamedTuple):
    """Tokens `[n]` of which the last `scored` are asked about, each after those before it."""

    tokens: np.ndarray
    scored: int


class Answer(NamedTuple):
    """Natural log-probabilities `[scored]`, and whether each token is the most likely one."""

    logprobs: np.ndarray
    greedy: np.ndarray

    @property
    def total(self) -> float:
        """The log-probability of all tokens together."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def certain(self) -> bool:
        """Whether greedy decoding writes these very tokens."""
        return bool(self.greedy.all())


def answers(
    model: Any, asks: Sequence[Ask], *, rows: int = 0, batch_tokens: int = 4096
) -> Iterator[tuple[int, Answer]]:
    """Each answer with the number of what was asked, as they come: longest texts first.

    Texts with the same tokens but the last are read once, such as one-token answers to a question.

    rows: texts at a time; 0 has about `batch_tokens` tokens at a time.

    Raises:
        UserError: for a text that the encoding has no place for.
    """
    spec = models.spec(model.cfg)
    models.check_backend(spec)
    same: dict[bytes, list[int]] = {}
    for number, ask in enumerate(asks):
        same.setdefault(np.asarray(ask.tokens[:-1], np.int32).tobytes(), []).append(number)
    groups = sorted(same.values(), key=lambda group: -len(asks[group[0]].tokens))
    if groups:
        models.check_limit(spec, len(asks[groups[0][0]].tokens) - 1)
    start = 0
    while start < len(groups):
        length = bucket(len(asks[groups[start][0]].tokens) - 1)
        size = rows or max(1, batch_tokens // length)
        some = groups[start : start + size]
        start += len(some)
        yield from _batch(spec, model.params, asks, some, (size, length))


def bucket(length: int) -> int:
    """The length of the program for so many tokens: 64, 96, 128, 192, 256, ..."""
    power = max(LEAST, 1 << (length - 1).bit_length())
    half = 3 * power // 4
    return half if power > LEAST and length <= half else power


def _batch(
    spec: ModelSpec,
    params: Any,
    asks: Sequence[Ask],
    groups: Sequence[Sequence[int]],
    shape: tuple[int, int],
) -> Iterator[tuple[int, Answer]]:
    """Answers of one call of the model; those of a group are asked about the same row."""
    tokens_BL, there_BL = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    places, numbers = [], [number for group in groups for number in group]
    for row, group in enumerate(groups):
        read = asks[group[0]].tokens[:-1]
        tokens_BL[row, : len(read)] = read
        there_BL[row, : len(read)] = 1
        places += [(row, len(read) - asks[n].scored, asks[n].tokens) for n in group]
    counts = [asks[number].scored for number in numbers]
    total = sum(counts)
    query_3Q = np.zeros((3, bucket(total)), np.int32)  # row, place, token
    query_3Q[:, :total] = np.concatenate(
        [
            [np.full(count, row), first + np.arange(count), tokens[len(tokens) - count :]]
            for (row, first, tokens), count in zip(places, counts, strict=True)
        ],
        axis=1,
    )
    x_BLD = _hidden(spec, params, tokens_BL, there_BL)
    logprob_Q, greedy_Q = map(np.asarray, _asked(spec, params, x_BLD, query_3Q))
    ends = np.cumsum(counts)
    for number, end, count in zip(numbers, ends, counts, strict=True):
        yield number, Answer(logprob_Q[end - count : end], greedy_Q[end - count : end])


@partial(jax.jit, static_argnums=0)
def _hidden(spec: ModelSpec, params: Any, tokens_BL: Tokens, there_BL: Tokens) -> Hidden:
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1], dtype=jnp.int32), there_BL.shape)
    context = Context(positions_BL, there_BL, jnp.full_like(there_BL, -1))
    return decoder.hidden(spec, params, tokens_BL, context, None)[0]


@partial(jax.jit, static_argnums=0)
def _asked(spec: ModelSpec, params: Any, x_BLD: Hidden, query_3Q: Array) -> tuple[Array, Array]:
    row_Q, place_Q, token_Q = query_3Q
    return of_tokens(spec, params, x_BLD[row_Q, place_Q], token_Q)


def of_tokens(spec: ModelSpec, params: Any, x_QD: Array, token_Q: Array) -> tuple[Array, Array]:
    """Log-probability float32 `[Q]` of a token after each output of the last layer, `[Q, D]`, and
    whether it is the most likely one; the head is applied to slices of about `LOGITS` logits."""

    def one(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        x_SD, token_S = inputs
        logits_SV = decoder.logits(spec, params, x_SD[None])[0].astype(jnp.float32)
        chosen_S = jnp.take_along_axis(logits_SV, token_S[:, None], axis=1)[:, 0]
        logprob_S = chosen_S - jax.nn.logsumexp(logits_SV, axis=1)
        return logprob_S, jnp.argmax(logits_SV, axis=1) == token_S

    count, size = len(token_Q), max(1, LOGITS // spec.vocab)
    if count <= size:
        return one((x_QD, token_Q))
    missing = -count % size
    x_QD, token_Q = jnp.pad(x_QD, ((0, missing), (0, 0))), jnp.pad(token_Q, (0, missing))
    slices = x_QD.reshape(-1, size, x_QD.shape[1]), token_Q.reshape(-1, size)
    return tuple(x.reshape(-1)[:count] for x in jax.lax.map(one, slices))
