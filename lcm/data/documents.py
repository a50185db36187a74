"""Documents, what a source of them must offer, and the held-out split."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple, Protocol

import numpy as np

from lcm.errors import ConfigError, DataError

Split = Literal["train", "heldout"]


class Document(NamedTuple):
    """A text and the name it is known by: stable when the corpus moves or grows.

    A prompt is read before the text and not learned; a source gives one to all its documents, be it
    empty, or to none.
    """

    name: str
    text: str
    prompt: str | None = None


class Source(Protocol):
    """Random access to documents (grain's protocol of that name), and names without reading."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def name(self, index: int) -> str: ...


class Subset(Sequence[Document]):
    """Some documents of a source, read when asked for."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Subset(self._source, self._indices[index])
        return self._source[int(self._indices[index])]

    def __repr__(self) -> str:
        return f"Subset({len(self)} of {len(self._source)} documents)"


def draw(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits: exact as a float, never 1.0


def is_heldout(name: str, fraction: float) -> bool:
    """Whether a document is held out; its name alone decides, so others never move it across."""
    return draw(name) < fraction


def take_split(source: Source, fraction: float, split: Split) -> Subset:
    """The documents of `source` of one split.

    Raises DataError if there are none, with a fraction that would give some.
    """
    if split not in ("train", "heldout"):
        raise ConfigError(f"split {split!r} is unknown: use 'train' or 'heldout'")
    draws = np.array([draw(source.name(index)) for index in range(len(source))])
    heldout = draws < fraction
    indices = np.flatnonzero(heldout if split == "heldout" else ~heldout)
    if len(indices) == 0:
        raise DataError(_empty_split(draws, fraction, split))
    return Subset(source, indices)


def _empty_split(draws: np.ndarray, fraction: float, split: Split) -> str:
    found = f"the {split} split is empty: data.heldout={fraction} of {len(draws)} document(s)"
    distinct = np.unique(draws)
    if len(distinct) < 2:
        whole = "0 to train on all of it" if split == "train" else "0 to hold out nothing"
        return f"{found}: give more documents, or set data.heldout={whole}"
    nearest = distinct[:2] if split == "heldout" else distinct[-2:]
    return f"{found}: give more documents, or set data.heldout={nearest.mean():.4g}"
