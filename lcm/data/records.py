"""Files that hold many documents each: JSON lines, Parquet, ArrayRecord."""

import functools
import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lcm.data.documents import Document
from lcm.data.files import File, decode, read
from lcm.errors import DataError

_CHUNK = 1 << 24  # bytes of a JSON-lines file that are indexed at a time


class Records(Protocol):
    """The documents of one file."""

    file: File

    def __len__(self) -> int: ...

    def number(self, index: int) -> int:
        """What the file calls the document: its line, row or record."""
        ...

    def text(self, index: int) -> str: ...


class RecordFiles:
    """The documents of several files, one file after the other, named `file:number`."""

    def __init__(self, parts: Sequence[Records]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[Records, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[which]
        return part, index - int(self._ends[which]) + len(part)

    def name(self, index: int) -> str:
        part, within = self._find(index)
        return f"{part.file.name}:{part.number(within)}"

    def __getitem__(self, index: int) -> Document:
        part, within = self._find(index)
        return Document(f"{part.file.name}:{part.number(within)}", part.text(within))


class JsonLines:
    """A JSON object a line, its text under `field`; blank lines are passed over.

    Offsets are found once, in one pass over the bytes; lines are read and parsed when asked for.
    """

    def __init__(self, file: File, field: str) -> None:
        self.file = file
        self._field = field
        self._numbers, self._starts, self._stops = _index_lines(file)

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, index: int) -> int:
        return int(self._numbers[index])

    def text(self, index: int) -> str:
        start, stop = int(self._starts[index]), int(self._stops[index])
        where = f"{self.file.path}, line {self.number(index)}"
        line = decode(read(self.file.path, start, stop - start), where, start)
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({error}): mend it or remove it") from None
        return _text_of(record, self._field, where)


def _text_of(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object but {_kind(record)}: write {{...}} a line")
    if field not in record:
        known = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{where} has no field {field!r}: set data.field to one it has ({known})")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {field!r} is not a string but {_kind(text)}: mend it or set data.field"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half a surrogate pair; UTF-8 cannot
        raise DataError(
            f"{where}: field {field!r} has the lone surrogate {text[error.start]!a}: remove it"
        ) from None
    return text


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return "null" if value is None else kinds.get(type(value), "a number")


def _index_lines(file: File) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number (from 1), first byte and end of every line that is not blank."""
    try:
        if file.path.stat().st_size == 0:
            return (np.zeros(0, np.int64),) * 3
        data = np.memmap(file.path, np.uint8, mode="r")
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror}") from error
    newlines = [
        start + np.flatnonzero(data[start : start + _CHUNK] == ord("\n"))
        for start in range(0, len(data), _CHUNK)
    ]
    stops = np.concatenate([*newlines, [len(data)]])  # the last line may lack its newline
    starts = np.concatenate([[0], stops[:-1] + 1])
    blank = stops == starts
    single = np.flatnonzero(stops - starts == 1)
    blank[single] = data[starts[single]] == ord("\r")
    kept = np.flatnonzero(~blank)
    return kept + 1, starts[kept], stops[kept]


class Parquet:
    """The rows of a Parquet file, their text in column `field`.

    Parquet has no access to single rows, and a shuffled read that decoded a row group for each
    document would be thousands of times too slow, so the column is decoded once, at the first read,
    and kept as Arrow: memory of the size of the text. Keep larger corpora in ArrayRecord.
    """

    def __init__(self, file: File, field: str) -> None:
        self.file = file
        self._field = field
        self._rows = _parquet_rows(file, field)

    def __reduce__(self):  # a worker process decodes the column itself
        return Parquet, (self.file, self._field)

    def __len__(self) -> int:
        return self._rows

    def number(self, index: int) -> int:
        return index

    @functools.cached_property
    def _column(self) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.read_table(self.file.path, columns=[self._field]).column(0)

    def text(self, index: int) -> str:
        text = self._column[index].as_py()
        if text is None:
            raise DataError(
                f"{self.file.path}, row {index}: column {self._field!r} is null: drop such rows"
            )
        return text


def _parquet_rows(file: File, field: str) -> int:
    """Rows of a Parquet file whose column `field` holds strings."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet needs pyarrow: pip install 'lcm[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
    except (OSError, ValueError) as error:
        raise DataError(f"{file.path} cannot be read as Parquet: {error}") from error
    strings = [
        column.name
        for column in schema
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    ]
    if field not in strings:
        problem = "is not of strings" if field in schema.names else "does not exist"
        known = ", ".join(map(repr, strings)) or "none"
        raise DataError(
            f"{file.path}: column {field!r} {problem}: "
            f"set data.field to a column of strings ({known})"
        )
    return rows


class ArrayRecord:
    """The records of an ArrayRecord file, each the UTF-8 bytes of a document."""

    def __init__(self, file: File) -> None:
        import grain

        self.file = file
        try:
            self._records = grain.sources.ArrayRecordDataSource([str(file.path)])
            self._length = len(self._records)
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(f"{file.path} cannot be read as ArrayRecord: {error}") from error

    def __len__(self) -> int:
        return self._length

    def number(self, index: int) -> int:
        return index

    def text(self, index: int) -> str:
        return decode(self._records[index], f"{self.file.path}, record {index}")
