"""The data pipeline: a config's `data` section to batches, documents, and errors found early.

    documents -> shuffle -> repeat -> this process's share -> read and tokenize (threads or workers)
              -> pack -> batch -> prefetch

An epoch is one pass over the documents of all processes together, in an order of its own. Packing
runs across the border between epochs, so nothing is dropped there: a row may hold the end of one
and the beginning of the next. Workers only read and tokenize, in an order that does not depend on
their number, and packing comes after them: batches are the same for any `data.workers`.
"""

import atexit
import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from absl import flags

from lcm.data import packing, settings, sources, tasks, tokenizers
from lcm.data.documents import Document, Split, Subset, take_split
from lcm.errors import ConfigError, DataError

_BIN_TOKENS = 2**18  # packed and shuffled together by default: about half a second of work
_CHECKED = 2**25  # characters that `check` reads
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)  # documents in flight


def documents(data: Any, split: Split = "heldout") -> Subset:
    """The documents of one split, in the order of the source, read when asked for.

    Raises ConfigError or DataError if there are none.
    """
    settings.validate(data)
    return take_split(sources.load(data.source, data.paths, data.field), data.heldout, split)


def batches(
    data: Any,
    *,
    length: int,
    batch_size: int,
    seed: int,
    split: Split = "train",
    process_index: int = 0,
    process_count: int = 1,
    epochs: int | None = None,
) -> "Batches":
    """An iterator over `Batch`es of numpy arrays `[batch_size, length]`, from position 0.

    batch_size: rows for this process, not for all of them.
    epochs: passes over the documents, None for no end. At the end rows and the last batch are
        filled up with padding, and processes may have different numbers of batches.

    Workers are started by spawning, so a script with `data.workers` above 0 must keep what it does
    behind `if __name__ == "__main__":`. Close the iterator to stop them.
    Raises ConfigError or DataError, also while iterating: files are read when their turn comes.
    """
    _validate(length, batch_size, seed, process_index, process_count)
    pack = packing.packer(data.packing)
    subset = documents(data, split)
    tokenizer = tokenizers.load(data.tokenizer)
    bins = data.packing_bins or max(batch_size, _BIN_TOKENS // length)
    encode = functools.partial(packing.encode, tokenizer=tokenizer, countdown=data.countdown)
    if tasks.is_task(data.source):
        encode = _Whole(encode, length)
    encoded = (
        grain.MapDataset.source(subset)
        .shuffle(seed=seed)
        .repeat(epochs)[process_index::process_count]
        .map(encode)
        .to_iter_dataset(_READ)
    )
    if data.workers:
        encoded = _in_workers(encoded, data.workers)
    rows = packing.batch(pack(encoded, length, bins, seed), batch_size)
    # Rows come in bursts of `bins`: a buffer of that many lets the next be packed meanwhile.
    ahead = grain.experimental.ThreadPrefetchIterDataset(
        rows, prefetch_buffer_size=max(2, bins // batch_size)
    )
    made_with = {
        "documents": len(subset),
        "length": length,
        "batch_size": batch_size,
        "seed": seed,
        "process_count": process_count,
        "data.packing": data.packing,
        "data.packing_bins": bins,
        "data.workers": data.workers,
    }
    return Batches(iter(ahead), made_with)


@dataclasses.dataclass(frozen=True)
class _Whole:
    """Encodes documents that must fit a row."""

    encode: Callable[[Document], np.ndarray]
    length: int

    def __call__(self, document: Document) -> np.ndarray:
        return packing.whole(self.encode(document), self.length)


def _in_workers(encoded: grain.IterDataset, workers: int) -> grain.IterDataset:
    if not flags.FLAGS.is_parsed():  # grain asks absl for flags that only absl's own main reads
        flags.FLAGS.mark_as_parsed()
    # Documents come through pipes: workers stopped in mid-document would leak shared memory.
    options = grain.experimental.DatasetOptions(min_shm_size=2**62)
    return grain.experimental.WithOptionsIterDataset(encoded, options).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=4)
    )


class Batches(grain.DatasetIterator):
    """The iterator of `batches`; its state is small, plain JSON, and exact."""

    def __init__(self, parent: grain.DatasetIterator, made_with: dict[str, Any]) -> None:
        super().__init__(parent)
        self._batches = parent
        self._made_with = made_with
        _open.add(self)

    def __next__(self):
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return {"made_with": self._made_with, "position": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved position.

        Raises DataError if it was saved with other documents or settings, where it would mean
        another place.
        """
        for key, value in self._made_with.items():
            if (saved := state["made_with"].get(key)) != value:
                raise DataError(
                    f"the saved data position was made with {key}={saved}, this run has {value}: "
                    f"set it back to resume, or start a new run"
                )
        self._batches.set_state(state["position"])

    def close(self) -> None:
        """Stops threads and workers and lets their buffers go; the iterator is of no more use."""
        super().close()
        self._parents, self._batches = (), iter(())


_open: weakref.WeakSet[Batches] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Iterators still alive at exit, before grain loses the modules its own clean-up needs."""
    for iterator in list(_open):
        iterator.close()


def check(data: Any) -> None:
    """Raises every error that can be found in a second or so, before anything is compiled.

    Loads the tokenizer, opens the source, makes both splits (either may be empty where
    `data.heldout` is 0 or 1, which says so), and reads the documents up to 32M characters.
    """
    settings.validate(data)
    packing.packer(data.packing)
    tokenizer = tokenizers.load(data.tokenizer)
    source = sources.load(data.source, data.paths, data.field)
    if data.heldout < 1:
        take_split(source, data.heldout, "train")
    if data.heldout > 0:
        take_split(source, data.heldout, "heldout")
    if tasks.is_task(data.source):  # made, not read: a few show whether the words are known
        for index in range(min(100, len(source))):
            packing.encode(source[index], tokenizer)
        return
    seen = 0
    for index in range(len(source)):
        seen += len(source[index].text)
        if seen > _CHECKED:
            return


def _validate(
    length: int, batch_size: int, seed: int, process_index: int, process_count: int
) -> None:
    if length < 1:
        raise ConfigError(f"length {length} holds no token: give at least 1")
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size} holds no row: give at least 1")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed {seed} is out of range: give one from 0 to {2**32 - 1}")
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process {process_index} of {process_count} does not exist")
