"""The header of a GGUF file: its metadata, and where its tensors lie.

The layout is that of the GGUF specification, versions 2 and 3 (github.com/ggml-org/ggml,
docs/gguf.md). The `gguf` package reads it too, but makes several arrays of each of the hundred
thousand strings of a vocabulary, which takes twenty times as long as all the rest of loading.
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from lcm.errors import DataError

_BOOL, _STRING, _ARRAY = 7, 8, 9
# Numbers by the id of their type, little-endian.
_NUMBERS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4"},
    **{_BOOL: "?", 10: "<u8", 11: "<i8", 12: "<f8"},
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor as stored: its shape slowest axis first, the id of its type, its first byte."""

    shape: tuple[int, ...]
    type: int
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata and tensors of a file by name; `data` is the whole file, uint8, memory-mapped."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: np.ndarray

    def need(self, key: str) -> Any:
        """The value of a key; DataError if the file has none."""
        if key not in self.metadata:
            raise DataError(f"{self.path} has no metadata {key}: convert the model to GGUF again")
        return self.metadata[key]


def read(path: str | Path) -> Header:
    """The header of a GGUF file.

    Raises DataError for a file that is none, is cut short, or of a version that is not read.
    """
    path = Path(path)
    try:
        data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}: give a GGUF file") from None
    cursor = _Cursor(memoryview(data), path)
    if bytes(data[:4]) != b"GGUF":
        raise DataError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
    cursor.at = 4
    version = cursor.number("<u4")
    if version not in (2, 3):
        big = version & 0xFFFF == 0  # a small number in the other byte order
        found = "of a big-endian machine" if big else f"of GGUF version {version}"
        raise DataError(f"{path} is {found}, and versions 2 and 3 are read: convert it again")
    tensors, keys = cursor.number("<u8"), cursor.number("<u8")
    metadata = {}
    for _ in range(keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("<u4"))
    entries = [cursor.tensor() for _ in range(tensors)]
    step = metadata.get("general.alignment", 32)
    if not isinstance(step, int) or step < 1:
        raise DataError(
            f"{path} has general.alignment={step}, not a number of bytes: convert again"
        )
    first = -(-cursor.at // step) * step  # offsets count from here
    infos = {name: TensorInfo(shape, kind, first + at) for name, shape, kind, at in entries}
    if metadata.get("split.count", 1) > 1:
        raise DataError(
            f"{path} is one of {metadata['split.count']} parts of a model: join them with "
            "llama-gguf-split --merge and give the whole file"
        )
    return Header(path, metadata, infos, data)


@dataclasses.dataclass
class _Cursor:
    """Reads one value after the other and never beyond the end."""

    view: memoryview
    path: Path
    at: int = 0

    def take(self, size: int) -> memoryview:
        end = self.at + size
        if end > len(self.view):
            raise DataError(
                f"{self.path} ends within its header, at byte {len(self.view)}: the file is cut "
                "short, fetch it again"
            )
        self.at, start = end, self.at
        return self.view[start:end]

    def number(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def numbers(self, kind: str, count: int) -> list[Any]:
        return np.frombuffer(self.take(np.dtype(kind).itemsize * count), kind).tolist()

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        found, length = [], struct.Struct("<Q")
        for _ in range(count):
            (size,) = length.unpack(self.take(8))
            found.append(bytes(self.take(size)))
        try:
            return [text.decode("utf-8") for text in found]
        except UnicodeDecodeError:
            raise DataError(
                f"{self.path} has a name or a text that is no UTF-8 before byte {self.at}: the "
                "file is damaged, fetch it again"
            ) from None

    def value(self, kind: int) -> Any:
        """A value of a type: a number, a text, or a list of one kind of them."""
        if kind == _ARRAY:
            kind, count = self.number("<u4"), self.number("<u8")
            if kind == _STRING:
                return self.strings(count)
            if kind in _NUMBERS:
                return self.numbers(_NUMBERS[kind], count)
        elif kind == _STRING:
            return self.string()
        elif kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        raise DataError(
            f"{self.path} has metadata of type {kind} before byte {self.at}, and 0 to 12 are "
            "known, lists of lists not: the file is damaged, fetch it again"
        )

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type, and offset among the data of a tensor."""
        name, axes = self.string(), self.number("<u4")
        shape = tuple(reversed(self.numbers("<u8", axes)))
        return name, shape, self.number("<u4"), self.number("<u8")
