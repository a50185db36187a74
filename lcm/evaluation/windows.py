"""Documents cut into windows, and the loss of every token under a scorer.

Each token is scored once, in one window: token i of a document under `cut(sizes, L, s)` stands at
position `window_positions(n, L, s)[i]` of its window and has at least L - s tokens before it, but
for the first window of a document. Positions restart at 0 in every window.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lcm.errors import ConfigError
from lcm.evaluation.documents import Document, EvaluationError
from lcm.types import Array, Batch, Context

Score = Callable[[Batch], Array]  # next-token negative log-likelihood, nats, float32 [B, L]


class Plan(NamedTuple):
    """Windows [start, end) of documents, of which [scored, end) is scored; int arrays `[W]`."""

    length: int
    document_W: np.ndarray
    start_W: np.ndarray
    scored_W: np.ndarray
    end_W: np.ndarray


def cut(sizes: Sequence[int], length: int, stride: int) -> Plan:
    """Windows that advance by `stride` tokens and score what the window before them did not see.

    `stride == length` is the non-overlapping protocol, `stride == 1` gives every token the full
    window. The first window of a document scores all of itself; the last may be shorter.
    """
    if not 1 <= stride <= length:
        raise ConfigError(f"stride {stride} must lie between 1 and the window length {length}")
    counts = [1 + max(0, -(-(size - length) // stride)) if size else 0 for size in sizes]
    document_W, nth_W = _enumerate(counts)
    start_W = nth_W * stride
    scored_W = np.where(start_W == 0, 0, start_W + length - stride)
    end_W = np.minimum(start_W + length, np.asarray(sizes)[document_W])
    return Plan(length, document_W, start_W, scored_W, end_W)


def cut_suffixes(sizes: Sequence[int], *, span: int, suffix: int, context: int) -> Plan:
    """The last `suffix` tokens of every whole span of a document, read after `context` tokens.

    The scored tokens depend on span and suffix alone, so contexts compare on the same tokens.
    """
    if context + suffix > span:
        raise ConfigError(
            f"context {context} and suffix {suffix} do not fit into {span} tokens of a document"
        )
    counts = [size // span for size in sizes]
    document_W, nth_W = _enumerate(counts)
    end_W = (nth_W + 1) * span
    scored_W = end_W - suffix
    return Plan(context + suffix, document_W, scored_W - context, scored_W, end_W)


def _enumerate(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """For `counts[d]` windows of each document d: their documents, and their number within it."""
    document_W = np.repeat(np.arange(len(counts)), counts)
    first_W = np.repeat(np.cumsum(counts) - counts, counts)
    return document_W, np.arange(len(document_W)) - first_W


def window_positions(size: int, length: int, stride: int) -> np.ndarray:
    """Position within its window of each scored token of a document of `size` tokens, `[N]`."""
    index_N = np.arange(size)
    return np.where(index_N < length, index_N, length - stride + (index_N - length) % stride)


def rows_per_batch(length: int, batch_tokens: int, of: int = 1) -> int:
    """Windows in a batch of about `batch_tokens` tokens: one shape, hence one compilation.

    They are a multiple of `of`, to be dealt out to as many groups of devices.
    """
    return of * max(1, batch_tokens // (length * of))


def batches(
    documents: Sequence[Document], plan: Plan, rows: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Batches `[rows, length]` with the indices of the windows they hold, padded in both axes."""
    for first in range(0, len(plan.document_W), rows):
        windows = np.arange(first, min(first + rows, len(plan.document_W)))
        tokens_BL, targets_BL, positions_BL, segments_BL = np.zeros(
            (4, rows, plan.length), np.int32
        )
        weight_BL = np.zeros((rows, plan.length), np.float32)
        for row, window in enumerate(windows):
            document = documents[plan.document_W[window]]
            start, scored, end = plan.start_W[window], plan.scored_W[window], plan.end_W[window]
            tokens_BL[row, : end - start] = document.tokens_N[start:end]
            targets_BL[row, : end - start] = document.targets_N[start:end]
            positions_BL[row, : end - start] = np.arange(end - start)
            segments_BL[row, : end - start] = 1
            weight_BL[row, scored - start : end - start] = 1
        context = Context(positions_BL, segments_BL, np.full_like(segments_BL, -1))
        yield windows, Batch(tokens_BL, targets_BL, context, weight_BL)


def planned_tokens(plan: Plan, batch_tokens: int, of: int = 1) -> int:
    """Tokens that go through the model for this plan, padding included."""
    rows = rows_per_batch(plan.length, batch_tokens, of)
    return -(-len(plan.document_W) // rows) * rows * plan.length


def token_losses(
    score: Score,
    documents: Sequence[Document],
    plan: Plan,
    *,
    batch_tokens: int,
    rows: int = 1,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[np.ndarray]:
    """Loss of each token of each document, float64 `[N]`; nan where the plan scores nothing.

    A batch is read back after the next one was handed to the scorer, so that a device that works
    asynchronously never waits. Batches have a multiple of `rows` windows; `advance` is told the
    tokens of each batch done.
    Raises EvaluationError at a loss that is not finite.
    """
    losses = [np.full(len(document.tokens_N), np.nan) for document in documents]
    pending = None
    size = rows_per_batch(plan.length, batch_tokens, rows)
    for windows, batch in batches(documents, plan, size):
        scored = (windows, score(batch), batch.tokens_BL.shape)
        if pending:
            _store(losses, documents, plan, *pending)
            advance(pending[2][0] * pending[2][1])
        pending = scored
    if pending:
        _store(losses, documents, plan, *pending)
        advance(pending[2][0] * pending[2][1])
    return losses


def _store(
    losses: list[np.ndarray],
    documents: Sequence[Document],
    plan: Plan,
    windows: np.ndarray,
    nll_BL: Array,
    shape: tuple[int, ...],
) -> None:
    """Write the scored part of each window to its document's losses."""
    nll_BL = np.asarray(nll_BL)
    if nll_BL.shape != shape:
        raise ValueError(f"the scorer returned shape {nll_BL.shape} for a batch of shape {shape}")
    for row, window in enumerate(windows):
        index = plan.document_W[window]
        start, scored, end = plan.start_W[window], plan.scored_W[window], plan.end_W[window]
        nll = nll_BL[row, scored - start : end - start]
        if not np.all(np.isfinite(nll)):
            token = int(scored + np.argmin(np.isfinite(nll)))
            raise EvaluationError(
                f"the loss of token {token} of document {documents[index].name!r} is"
                f" {nll[token - scored]} (position {token - start} of a window of {plan.length}):"
                " the model overflows there; evaluate an earlier checkpoint or in float32"
            )
        losses[index][scored:end] = nll
