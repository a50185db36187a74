"""Tokenizers: bytes, a Hugging Face `tokenizer.json`, a SentencePiece `.model`, a task's words.

A tokenizer here is the map between text and ids and nothing else: `packing.encode` puts the first
and last token of the document around it. A special token written out in a text is just text.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lcm.data import tasks
from lcm.errors import DataError

_MISSING = "{what} needs {package}: pip install 'lcm[data]'"
# What tokenizers that say nothing about it call their first and last token; the first found counts.
_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "[CLS]")
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """Text to ids and back. `bos` and `eos` may be one id; every id is below `vocab_size`."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos(self) -> int: ...

    @property
    def eos(self) -> int: ...

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 `[n]`, without special tokens."""
        ...

    def encode_aligned(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of `text` and the UTF-8 bytes each stands for, int32 `[n]` both.

        Every byte counts for exactly one token, so the counts add up to the bytes of the text
        whatever the tokenizer normalises or drops, and bits per byte are exact: a token has the
        bytes from the end of the token before it to its own end, the last one those left over.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`, special tokens left out, bytes that are no UTF-8 as U+FFFD."""
        ...


def load(spec: str) -> Tokenizer:
    """The tokenizer a config names: `bytes`, `task:NAME`, or the path of a file or its folder.

    Raises DataError for what is missing, unreadable, of an unknown kind, or has no last token.
    """
    if spec == "bytes":
        return Bytes()
    if tasks.is_task(spec):
        return tasks.make(spec).vocabulary
    path = Path(spec).expanduser()
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise DataError(f"data.tokenizer: {spec} does not exist: give a file, or 'bytes'")
    if path.suffix == ".json":
        return HuggingFace(path)
    if path.suffix == ".model":
        return SentencePiece(path)
    raise DataError(
        f"data.tokenizer: {spec} is of no known kind: give a tokenizer.json, a SentencePiece "
        ".model, or 'bytes'"
    )


def _in_folder(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"data.tokenizer: folder {folder} has neither tokenizer.json nor tokenizer.model: "
        "save a fast tokenizer there, or give 'bytes'"
    )


@dataclasses.dataclass(frozen=True)
class Bytes:
    """The 256 byte values of UTF-8, and id 256 before and after each document."""

    vocab_size: int = dataclasses.field(default=257, init=False)
    bos: int = dataclasses.field(default=256, init=False)
    eos: int = dataclasses.field(default=256, init=False)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_aligned(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(text)
        return ids, np.ones_like(ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        values = np.asarray(ids, np.int64)
        return bytes(values[values < 256].astype(np.uint8)).decode("utf-8", errors="replace")


class HuggingFace:
    """A fast tokenizer of the `tokenizers` package.

    First and last token are those of the `tokenizer_config.json` beside the file; where that says
    nothing, special tokens with a usual name (`<s>`, `</s>`, `<|endoftext|>`, ...). Without a first
    token the last one serves as both, as in GPT-2.
    """

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            missing = _MISSING.format(what="tokenizer.json", package="tokenizers")
            raise DataError(missing) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise DataError(f"data.tokenizer: {path} is not a tokenizer.json: {error}") from None
        self._path = path
        self._tokenizer.no_truncation()  # settings of the file that would lose or add tokens
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # special tokens in a text are text
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos, self.eos = _special_ids(self._tokenizer, path)

    def __reduce__(self):  # pickling the tokenizer itself would lose the settings above
        return HuggingFace, (self._path,)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_aligned(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ends = np.array([end for _, end in encoding.offsets], np.int64)
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        bytes_before = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
        counts = _bytes_between(bytes_before[ends], int(bytes_before[-1]))
        return np.array(encoding.ids, np.int32), counts

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def _special_ids(tokenizer: Any, path: Path) -> tuple[int, int]:
    config = _read_config(path.with_name("tokenizer_config.json"))
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}

    def find(key: str, usual: tuple[str, ...]) -> int | None:
        named = config.get(key)
        named = named.get("content") if isinstance(named, dict) else named
        token = named or next((name for name in usual if name in special), None)
        if token is None:
            return None
        if (number := tokenizer.token_to_id(token)) is None:
            raise DataError(f"data.tokenizer: {key} {token!r} is not a token of {path}")
        return number

    eos = find("eos_token", _EOS_NAMES)
    if eos is None:
        raise DataError(
            f"data.tokenizer: {path} has no token for the end of a document: add one, or name it "
            "as eos_token in a tokenizer_config.json beside it"
        )
    bos = find("bos_token", _BOS_NAMES)
    return (eos if bos is None else bos), eos


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}: mend it or remove it") from None
    if not isinstance(config, dict):
        raise DataError(f"{path} is not a JSON object: mend it or remove it")
    return config


class SentencePiece:
    """A SentencePiece model; without a first token the last one serves as both.

    Most models normalise (runs of blanks and newlines become one blank), so that `decode` does not
    give the text back.
    """

    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            missing = _MISSING.format(what="a .model tokenizer", package="sentencepiece")
            raise DataError(missing) from error
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"data.tokenizer: {path} is not a SentencePiece model: {error}"
            ) from None
        self._path = path
        self.vocab_size = self._model.get_piece_size()
        self.eos = self._model.eos_id()
        if self.eos < 0:  # SentencePiece's word for a token that does not exist
            raise DataError(
                f"data.tokenizer: {path} has no token for the end of a document: "
                "train the model with --eos_id set"
            )
        self.bos = self._model.bos_id() if self._model.bos_id() >= 0 else self.eos

    def __reduce__(self):
        return SentencePiece, (self._path,)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text), np.int32)

    def encode_aligned(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        pieces = self._model.encode(text, return_type="proto").pieces
        # Lengths of the stretches of text, not their ends: releases differ in the unit of those.
        ends = np.cumsum([len(piece.surface.encode("utf-8")) for piece in pieces], dtype=np.int64)
        counts = _bytes_between(ends, len(text.encode("utf-8")))
        return np.array([piece.id for piece in pieces], np.int32), counts

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids])


def _bytes_between(ends: np.ndarray, total: int) -> np.ndarray:
    """Bytes from each token's predecessor to its own end; the last token's end is the text's."""
    ends = np.maximum.accumulate(ends)
    ends[-1:] = total
    return np.diff(ends, prepend=0).astype(np.int32)
