"""Held-out documents as tokens, and how many of their tokens an evaluation reads."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lcm.errors import UserError


class EvaluationError(UserError):
    """A model cannot be evaluated on these documents, or a result cannot be read or written."""


class Document(NamedTuple):
    """One held-out document; `tokens_N` is BOS + text and `targets_N` is text + EOS, both int32.

    So BOS is read but never scored, and EOS is scored but never read.
    """

    name: str
    tokens_N: np.ndarray
    targets_N: np.ndarray
    text_bytes: int


def from_text_tokens(
    name: str, text_tokens: Sequence[int], *, bos: int, eos: int, text_bytes: int
) -> Document:
    """Document of the tokens of a text without special tokens, and the bytes of that text."""
    framed = np.concatenate([[bos], np.asarray(text_tokens, np.int32), [eos]]).astype(np.int32)
    return Document(name, framed[:-1], framed[1:], text_bytes)


def head(document: Document, size: int) -> Document:
    """The first `size` positions; bytes are counted in proportion, exact only for the whole."""
    whole = len(document.tokens_N)
    if size >= whole:
        return document
    text_bytes = round(document.text_bytes * size / whole)
    return Document(document.name, document.tokens_N[:size], document.targets_N[:size], text_bytes)


def within_budget(
    documents: Sequence[Document], *, span: int, max_tokens: int | None, seed: int = 0
) -> list[Document]:
    """Documents cut at their ends so that together they hold at most `max_tokens`.

    Every document, in an order drawn from the seed, gives its first `span` tokens before any gives
    its second: as many documents as the budget allows, for they are what intervals rest on.
    Documents that give nothing are left out; the others keep their order.
    """
    if max_tokens is None:
        return list(documents)
    sizes_D = np.array([len(document.tokens_N) for document in documents])
    order = np.random.default_rng(seed).permutation(len(documents))
    taken_D, left, start = np.zeros_like(sizes_D), max_tokens, 0
    while left and np.any(sizes_D > start):
        for index in order[sizes_D[order] > start]:
            amount = min(span, sizes_D[index] - start)
            if amount > left:
                left = 0
                break
            taken_D[index] += amount
            left -= amount
        start += span
    return [
        head(document, taken) for document, taken in zip(documents, taken_D, strict=True) if taken
    ]


def at_least(documents: Sequence[Document], length: int) -> list[Document]:
    """Documents of `length` tokens or more, cut to whole multiples of it.

    Raises EvaluationError naming the longest document if there is none.
    """
    kept = [head(d, len(d.tokens_N) // length * length) for d in documents]
    kept = [document for document in kept if len(document.tokens_N)]
    if not kept:
        longest = max(documents, key=lambda document: len(document.tokens_N))
        raise EvaluationError(
            f"no held-out document reaches {length} tokens, the longest window: the longest,"
            f" {longest.name!r}, has {len(longest.tokens_N)}; evaluate at smaller multiples of the"
            " training length, or hold out longer documents"
        )
    return kept
