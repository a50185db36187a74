"""The embedded corpus: the running Python's standard library and its documentation topics."""

import os
import sysconfig
from pathlib import Path

from lcm.data.documents import Document
from lcm.errors import DataError

# Tests are left out: distributions such as Debian do not ship them, and they are 60 % of the bytes
# of the others, much of it tables and the files that are broken on purpose.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_TOPICS_MODULE = "pydoc_data/topics.py"  # the topics themselves: they would be in both splits
_TOPIC = "topics/"


class StandardLibrary:
    """Every `.py` file of the standard library, tests apart, then the topics of `help()`.

    The same documents in the same order for one installation of Python: about 700 modules and 79
    topics, 12 MB. Empty files are left out, and, for this source only, files that are not UTF-8.
    """

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))
        self._names = [*sorted(_modules(self._root)), *sorted(_TOPIC + t for t in _topics())]

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def __getitem__(self, index: int) -> Document:
        name = self._names[index]
        if name.startswith(_TOPIC):
            return Document(name, _topics()[name.removeprefix(_TOPIC)])
        return Document(name, (self._root / name).read_text(encoding="utf-8"))


def _modules(root: Path) -> list[str]:
    """Names of the modules below `root` that can be read, with slashes on every system."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and not _of_this_machine(f)]
        paths = (Path(folder, f) for f in files if f.endswith(".py") and not _of_this_machine(f))
        names += [path.relative_to(root).as_posix() for path in paths if _readable(path)]
    if not names:
        raise DataError(
            f"this Python has no library sources in {root}: set data.source=text and data.paths"
        )
    return [name for name in names if name != _TOPICS_MODULE]


def _of_this_machine(name: str) -> bool:
    """Build settings and site hooks: other content on other machines with the same Python."""
    return name.startswith(("_sysconfigdata", "config-", "sitecustomize", "usercustomize"))


def _readable(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, OSError):
        return False


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python has no pydoc_data.topics: install a complete one, "
            "or set data.source=text and data.paths"
        ) from error
    return topics
