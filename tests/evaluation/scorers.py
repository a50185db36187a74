"""Scorers in numpy whose losses are known: uniform, bigram, a copier, and models of short reach."""

import numpy as np

from lcm.evaluation.documents import Document, from_text_tokens

BOS, EOS, VOCABULARY = 0, 1, 12


def uniform(batch):
    return np.full(batch.tokens_BL.shape, np.log(VOCABULARY), np.float32)


def bigram_table(seed=0):
    """Losses of the next token given the current one, `[V, V]`, rows normalised."""
    logits = np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY))
    return (np.log(np.exp(logits).sum(1, keepdims=True)) - logits).astype(np.float32)


def bigram(table):
    return lambda batch: table[batch.tokens_BL, batch.targets_BL]


def copier(lag):
    """Expects what stood `lag` tokens back: 0.1 nats if right, 5 if wrong, a guess if unseen."""

    def score(batch):
        expected_BL = np.full_like(batch.tokens_BL, -1)
        expected_BL[:, lag - 1 :] = batch.tokens_BL[:, : batch.tokens_BL.shape[1] - lag + 1]
        right = np.where(expected_BL == batch.targets_BL, 0.1, 5.0)
        return np.where(expected_BL < 0, np.log(VOCABULARY), right).astype(np.float32)

    return score


def local(reach):
    """A loss that depends on the last `reach` tokens alone, or on as many as there are."""

    def score(batch):
        loss_BL = np.zeros(batch.tokens_BL.shape, np.float64)
        for back in range(reach):
            seen_BL = np.roll(batch.tokens_BL, back, axis=1) * np.sqrt(2 + back)
            seen_BL[:, :back] = 0.5  # before the window
            loss_BL += np.sin(seen_BL + back)
        return loss_BL.astype(np.float32)

    return score


def by_position(function):
    """A loss that depends on nothing but the position in the window."""
    return lambda batch: function(batch.context.positions_BL).astype(np.float32)


def random_document(name, size, seed=0) -> Document:
    """A document of `size` positions: BOS + (size - 1) text tokens, as many bytes."""
    text = np.random.default_rng([seed, size]).integers(2, VOCABULARY, size - 1)
    return from_text_tokens(name, text, bos=BOS, eos=EOS, text_bytes=size - 1)
