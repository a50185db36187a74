"""The sources a config can name; a new one is a function here and a line in `SOURCES`."""

from collections.abc import Callable

from lcm.data.documents import Document, Source
from lcm.data.files import File, decode, match, read
from lcm.data.records import ArrayRecord, JsonLines, Parquet, RecordFiles
from lcm.data.stdlib import StandardLibrary
from lcm.data.tasks import is_task
from lcm.data.tasks import source as task_source
from lcm.errors import DataError


class TextFiles:
    """A document a file, read when asked for."""

    def __init__(self, files: list[File]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files[index].name

    def __getitem__(self, index: int) -> Document:
        path, name = self._files[index]
        return Document(name, decode(read(path), str(path)))


def stdlib(paths: str, field: str) -> Source:
    """This Python's library: needs no files and no network."""
    if paths:
        raise DataError(
            f"data.paths={paths!r} is set but data.source=stdlib reads no files: "
            "set data.source to text, jsonl, parquet or array_record"
        )
    return StandardLibrary()


def text(paths: str, field: str) -> Source:
    return TextFiles(match(paths))


def jsonl(paths: str, field: str) -> Source:
    return RecordFiles([JsonLines(file, field) for file in match(paths)])


def parquet(paths: str, field: str) -> Source:
    return RecordFiles([Parquet(file, field) for file in match(paths)])


def array_record(paths: str, field: str) -> Source:
    return RecordFiles([ArrayRecord(file) for file in match(paths)])


SOURCES: dict[str, Callable[[str, str], Source]] = {
    "stdlib": stdlib,
    "text": text,
    "jsonl": jsonl,
    "parquet": parquet,
    "array_record": array_record,
}


def load(source: str, paths: str = "", field: str = "text") -> Source:
    """The documents of a source named in `SOURCES`, or of a task (lcm.data.tasks).

    Raises DataError for an unknown source, files that are missing or cannot be read as what they
    are said to be, and a corpus without a character of text.
    """
    if is_task(source):
        return task_source(source)
    if source not in SOURCES:
        known = ", ".join(SOURCES)
        raise DataError(f"data.source={source!r} is unknown: use one of {known}, or task:NAME")
    documents = SOURCES[source](paths, field)
    if not any(documents[index].text for index in range(len(documents))):
        raise DataError(
            f"the corpus is empty: data.source={source}, data.paths={paths!r} give "
            f"{len(documents)} document(s) without text: name files that have some"
        )
    return documents
