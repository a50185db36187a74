"""A tokenizer of whole words and symbols, its vocabulary fixed by a task."""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from lcm.errors import DataError

_BLANK = re.compile(r"\s+")


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of a task, longest first where several fit; ids 0 and 1 begin and end an example.

    Blanks separate words and are otherwise no part of a text: `decode` puts one between any two.
    """

    words: tuple[str, ...]
    bos: int = dataclasses.field(default=0, init=False)
    eos: int = dataclasses.field(default=1, init=False)
    add_bos: bool = dataclasses.field(default=True, init=False)
    stops: tuple[int, ...] = dataclasses.field(default=(1,), init=False)
    special_ids: frozenset[int] = dataclasses.field(default=frozenset({0, 1}), init=False)

    @property
    def vocab_size(self) -> int:
        return 2 + len(self.words)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {word: 2 + index for index, word in enumerate(self.words)}

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        return re.compile("|".join(map(re.escape, sorted(self.words, key=len, reverse=True))))

    def split(self, text: str) -> list[str]:
        """The words of a text.

        Raises DataError for a text with anything else in it.
        """
        found = self._pattern.findall(text)
        if sum(map(len, found)) != len(_BLANK.sub("", text)):
            rest = self._pattern.sub(" ", text).split()
            raise DataError(
                f"{rest[0]!r} of {text!r} is no word of this task: give text in its own words, "
                "or set data.tokenizer=bytes"
            )
        return found

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        return np.array([self._ids[word] for word in self.split(text)], np.int32)

    def encode_aligned(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(text)
        ends = np.array([match.end() for match in self._pattern.finditer(text)], np.int64)
        ends[-1:] = len(text)  # what follows the last word counts for it
        width = np.cumsum([0, *(len(character.encode("utf-8")) for character in text)])
        return ids, np.diff(width[ends], prepend=0).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray, special: bool = False) -> str:
        return " ".join(self.words[i - 2] for i in map(int, ids) if i >= 2)

    def token_bytes(self, token: int) -> bytes:
        return f" {self.words[token - 2]}".encode() if token >= 2 else b""
