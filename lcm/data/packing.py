"""Documents to rows of one length: (token, target) pairs, segments, positions; by grain's packers.

Whatever the packer, a pair is one element that cannot be torn apart, dropped or doubled: the token,
its target, its countdown and its weight travel as the columns of one array.
"""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from lcm.data.documents import Document
from lcm.data.tokenizers import Tokenizer
from lcm.errors import ConfigError, DataError
from lcm.types import Batch, Context

TOKEN, TARGET, REMAINING, WEIGHT = 0, 1, 2, 3  # columns of an encoded document
_PAIRS = "pairs"


def encode(document: Document, tokenizer: Tokenizer, countdown: bool = False) -> np.ndarray:
    """A document as int32 `[n + 1, 2]`: tokens BOS, c1 ... cn beside targets c1 ... cn, EOS.

    With `countdown` a third column counts the content tokens still to come after each token, so
    that it is n at BOS and 0 where the target is EOS (the convention of LDPE and ORPE,
    arXiv:2412.11937). An empty document is the pair (BOS, EOS).

    A document with a prompt begins with it and has four columns, whatever `countdown` is: the last
    is the weight in the loss, 0 where the target is of the prompt and 1 elsewhere.
    """
    content = tokenizer.encode(document.text)
    prompt = np.zeros(0, np.int32)
    if document.prompt is not None:
        prompt = tokenizer.encode(document.prompt)
        content = np.concatenate([prompt, content])
    columns = 4 if document.prompt is not None else 3 if countdown else 2
    pairs = np.empty((len(content) + 1, columns), np.int32)
    pairs[0, TOKEN], pairs[1:, TOKEN] = tokenizer.bos, content
    pairs[:-1, TARGET], pairs[-1, TARGET] = content, tokenizer.eos
    if columns > REMAINING:
        pairs[:, REMAINING] = np.arange(len(content), -1, -1) if countdown else -1
    if columns > WEIGHT:
        pairs[:, WEIGHT] = np.arange(len(pairs)) >= len(prompt)
    return pairs


def whole(pairs: np.ndarray, length: int) -> np.ndarray:
    """The pairs of a document that must not be cut.

    Raises DataError if it does not fit a row.
    """
    if len(pairs) > length:
        raise DataError(
            f"an example of {len(pairs)} tokens does not fit a row of {length}, and half of one "
            f"teaches nothing: set data.length={len(pairs)} or more, or give shorter lengths"
        )
    return pairs


def concat(documents: grain.IterDataset, length: int, bins: int, seed: int) -> grain.IterDataset:
    """Documents end to end, cut every `length` pairs: no padding before the end of the stream.

    The rows of a long document come one after the other, so `bins` of them are shuffled together.
    """
    rows = grain.experimental.ConcatThenSplitIterDataset(
        _as_feature(documents), length_struct={_PAIRS: length}
    )
    return grain.experimental.WindowShuffleIterDataset(
        _JsonState(rows), window_size=bins, seed=seed
    )


def first_fit(documents: grain.IterDataset, length: int, bins: int, seed: int) -> grain.IterDataset:
    """Each document in the first of `bins` open rows with room; all are closed when none has."""
    return grain.experimental.FirstFitPackIterDataset(
        _pieces(documents, length),
        length_struct={_PAIRS: length},
        num_packing_bins=bins,
        seed=seed,
    )


def best_fit(documents: grain.IterDataset, length: int, bins: int, seed: int) -> grain.IterDataset:
    """Each document in the fullest of `bins` open rows with room; all are closed when none has."""
    return grain.experimental.BestFitPackIterDataset(
        _pieces(documents, length),
        length_struct={_PAIRS: length},
        num_packing_bins=bins,
        seed=seed,
    )


Packer = Callable[[grain.IterDataset, int, int, int], grain.IterDataset]
PACKERS: dict[str, Packer] = {"concat": concat, "first_fit": first_fit, "best_fit": best_fit}


def packer(name: str) -> Packer:
    """The packer of this name; raises ConfigError naming those there are."""
    if name not in PACKERS:
        raise ConfigError(f"data.packing={name!r} is unknown: use one of {', '.join(PACKERS)}")
    return PACKERS[name]


def batch(rows: grain.IterDataset, batch_size: int) -> grain.IterDataset:
    """Packed rows as `Batch`es of `batch_size`; the last one of a finite stream ends in padding."""
    return rows.batch(
        batch_size,
        batch_fn=lambda some: grain.experimental.batch_and_pad(some, batch_size=batch_size),
    ).map(_to_batch)


def _to_batch(packed: dict[str, np.ndarray]) -> Batch:
    """Splits the columns again.

    Positions restart at 0 in each piece of a document that was cut, as segments do: a piece cannot
    attend to the one before it, so it is a context of its own, and its first token stands where
    first tokens stand at inference. Positions then never pass the length trained on.
    """
    pairs = packed[_PAIRS]
    segments = packed[f"{_PAIRS}_segment_ids"]
    real = segments > 0
    countdown = pairs.shape[-1] > REMAINING
    remaining = np.full_like(segments, -1)
    if countdown:
        remaining[real] = pairs[..., REMAINING][real]
    weight = pairs[..., WEIGHT] * real if pairs.shape[-1] > WEIGHT else real
    return Batch(
        tokens_BL=np.ascontiguousarray(pairs[..., TOKEN]),
        targets_BL=np.ascontiguousarray(pairs[..., TARGET]),
        context=Context(packed[f"{_PAIRS}_positions"], segments, remaining),
        loss_weight_BL=weight.astype(np.float32),
    )


def _as_feature(documents: grain.IterDataset) -> grain.IterDataset:
    return documents.map(lambda pairs: {_PAIRS: pairs})


def _pieces(documents: grain.IterDataset, length: int) -> grain.IterDataset:
    """Documents cut every `length` pairs, as packers of whole elements need them."""
    return grain.experimental.FlatMapIterDataset(documents, _Cut(length))


class _Cut(grain.experimental.FlatMapTransform):
    max_fan_out = 2**62  # grain limits random-access datasets by this, not streams

    def __init__(self, length: int) -> None:
        self._length = length

    def flat_map(self, element: np.ndarray) -> list[dict[str, np.ndarray]]:
        starts = range(0, len(element), self._length)
        return [{_PAIRS: element[start : start + self._length]} for start in starts]


class _JsonState(grain.IterDataset):
    """Lets the state of concatenate-and-split survive JSON.

    grain 0.2.18 compares its slices with a tuple; JSON gives lists back, and then a row that ended
    with its document restores one document too late, without a word.
    """

    def __init__(self, rows: grain.IterDataset) -> None:
        super().__init__(rows)
        self._rows = rows

    def __iter__(self) -> grain.DatasetIterator:
        return _JsonStateIterator(iter(self._rows))


class _JsonStateIterator(grain.DatasetIterator):
    def __init__(self, rows: grain.DatasetIterator) -> None:
        super().__init__(rows)
        self._rows = rows

    def __next__(self) -> Iterator[dict[str, np.ndarray]]:
        return next(self._rows)

    def get_state(self) -> dict[str, Any]:
        return self._rows.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        slices = {name: tuple(slice_) for name, slice_ in state["remainder_slices"].items()}
        self._rows.set_state({**state, "remainder_slices": slices})
