"""What a text of Python is about, and the text: pairs of query and passage from real sources.

The query is the first paragraph of a definition's docstring, the passage its code without the
docstring. Help topics give theirs too: title and what stands below it.
"""

import ast
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lcm.data.documents import Document, Source
from lcm.errors import ConfigError

PAD, EOS = 0, 1
_RESERVED = 2
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")


class Description(NamedTuple):
    """A name as stable as its document's, what is said of a passage, and the passage."""

    name: str
    query: str
    passage: str


def descriptions(source: Source, fewest: int = 4) -> Iterator[Description]:
    """Pairs of all documents whose query and passage have `fewest` words; queries said twice, which
    would have two answers, are left to the first that has them."""
    seen = set()
    for index in range(len(source)):
        document = source[index]
        of = _of_code if document.name.endswith(".py") else _of_topic
        for name, query, passage in of(document):
            text = " ".join(query.split())
            if text not in seen and min(len(words(text)), len(words(passage))) >= fewest:
                seen.add(text)
                yield Description(f"{document.name}:{name}", text, passage)


def _of_code(document: Document) -> Iterator[tuple[str, str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the escapes in old modules
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        said = ast.get_docstring(node)
        if said and len(node.body) > 1:
            lines = document.text.splitlines()
            head = lines[node.lineno - 1 : node.body[0].lineno - 1]
            code = lines[node.body[0].end_lineno : node.end_lineno]
            yield f"{node.name}:{node.lineno}", said.split("\n\n")[0], "\n".join([*head, *code])


def _of_topic(document: Document) -> Iterator[tuple[str, str, str]]:
    title, _, below = document.text.strip().partition("\n")
    yield "title", title, below.strip("*=-~ \n")


def words(text: str) -> list[str]:
    """Words in lower case; those of identifiers apart, `readLine` and `read_line` as two."""
    return [word.lower() for word in _WORD.findall(text)]


def rows(
    texts: Sequence[Sequence[str]], vocabulary: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Words as int32 ids `[B, length]`, cut so that an EOS follows them, and how many there are.

    Ids are hashes of words, the same on every machine; two words may share one.

    Raises:
        ConfigError: for a vocabulary without an id of words, or rows without room for EOS.
    """
    if vocabulary <= _RESERVED or length < 1:
        raise ConfigError(
            f"vocabulary={vocabulary}, length={length}: give {_RESERVED + 1} ids or more, and 1 "
            "token or more"
        )
    tokens_BL, count_B = np.full((len(texts), length), PAD, np.int32), np.zeros(len(texts), int)
    for row, text in enumerate(texts):
        ids = [_RESERVED + zlib.crc32(word.encode()) % (vocabulary - _RESERVED) for word in text]
        ids = [*ids[: length - 1], EOS]
        tokens_BL[row, : len(ids)], count_B[row] = ids, len(ids)
    return tokens_BL, count_B.astype(np.int32)
