"""Files named by a config, and reading them with errors that say what to do."""

import glob
from pathlib import Path
from typing import NamedTuple

from lcm.errors import DataError


class File(NamedTuple):
    """A file, and its name below the folder the pattern starts from: the same on every machine."""

    path: Path
    name: str


def match(paths: str) -> list[File]:
    """Files of a comma-separated list of paths and globs (`**` goes through folders), sorted.

    Raises DataError for an entry that matches no file.
    """
    files: dict[Path, File] = {}
    for pattern in filter(None, (entry.strip() for entry in paths.split(","))):
        for file in _match_one(Path(pattern).expanduser()):
            files.setdefault(file.path.resolve(), file)  # a file matched twice is read once
    if not files:
        raise DataError("data.paths is empty: name a file or a glob such as 'corpus/**/*.txt'")
    return sorted(files.values())


def _match_one(pattern: Path) -> list[File]:
    if pattern.is_file():
        return [File(pattern, pattern.name)]
    if pattern.is_dir():
        raise DataError(f"data.paths: {pattern} is a folder: write {pattern}/**/* for its files")
    if not glob.has_magic(str(pattern)):
        raise DataError(f"data.paths: {pattern} does not exist (from folder {Path.cwd()})")
    fixed = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    found = [Path(path) for path in glob.glob(str(pattern), recursive=True)]
    files = [File(path, path.relative_to(fixed).as_posix()) for path in found if path.is_file()]
    if not files:
        raise DataError(
            f"data.paths: no file matches {pattern} (from folder {Path.cwd()}): "
            "check the pattern; ** goes through folders, * does not"
        )
    return files


def read(path: Path, start: int = 0, size: int = -1) -> bytes:
    """Bytes of a file, from `start`, at most `size` of them (-1: to its end)."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def decode(raw: bytes, where: str, start: int = 0) -> str:
    """UTF-8 text without a byte-order mark; errors count bytes from `start`.

    Raises DataError naming the first byte that is not UTF-8.
    """
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 at byte {start + error.start} (0x{raw[error.start]:02x}): "
            "convert it (iconv -f latin1 -t utf-8) or leave it out of data.paths"
        ) from None
