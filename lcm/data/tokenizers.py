"""Tokenizers: bytes, a `tokenizer.json`, a SentencePiece `.model`, a `.gguf`, a task's words.

A tokenizer here is the map between text and ids and nothing else: `packing.encode` puts the first
and last token of the document around it. A special token written out in a text is just text, unless
`special=True` says that the text was made with them, as a chat template does.
"""

import dataclasses
import functools
import itertools
import json
import pickle
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lcm.data import gguf, gguf_tokenizer, tasks
from lcm.errors import DataError

_MISSING = "{what} needs {package}: pip install 'lcm[data]'"
# What tokenizers that say nothing about it call their first and last token; the first found counts.
_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "[CLS]")
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "[SEP]")
# What ends a text or a turn of a conversation in published models, whatever their file says of it.
_STOP_NAMES = (
    *("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>"),
)
_BYTE = re.compile(
    "<0x([0-9A-Fa-f]{2})>"
)  # a byte of a SentencePiece vocabulary with byte fallback


class Tokenizer(Protocol):
    """Text to ids and back. `bos` and `eos` may be one id; every id is below `vocab_size`."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos(self) -> int: ...

    @property
    def eos(self) -> int: ...

    @property
    def add_bos(self) -> bool:
        """Whether the texts a model of this tokenizer knows begin with `bos`."""
        ...

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids at which generated text ends: `eos` first, then such as the end of a turn."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are no text."""
        ...

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Ids of `text`, int32 `[n]`; special tokens written in it are text, or with `special` ids.

        No first or last token is put around it.
        """
        ...

    def encode_aligned(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of `text` and the UTF-8 bytes each stands for, int32 `[n]` both.

        Every byte counts for exactly one token, so the counts add up to the bytes of the text
        whatever the tokenizer normalises or drops, and bits per byte are exact: a token has the
        bytes from the end of the token before it to its own end, the last one those left over.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray, special: bool = False) -> str:
        """Text of `ids`, special tokens left out or with `special` written out.

        Bytes that are no UTF-8 become U+FFFD.
        """
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text before it; none for a special token.

        One after the other they are the UTF-8 of `decode`, up to a blank at either end: a first
        token that stands for a word with the blank before it loses it in `decode`, not here.
        """
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
        return HuggingFace.read(path)
    if path.suffix == ".model":
        return SentencePiece(path)
    if path.suffix == ".gguf":
        return from_gguf(gguf.read(path))
    raise DataError(
        f"data.tokenizer: {spec} is of no known kind: give a tokenizer.json, a SentencePiece "
        ".model, a .gguf, or 'bytes'"
    )


def from_gguf(header: gguf.Header) -> "HuggingFace":
    """The tokenizer of a GGUF file; a `tokenizer.json` beside it is preferred."""
    if (beside := header.path.with_name("tokenizer.json")).is_file():
        return HuggingFace.read(beside)
    _package(f"the tokenizer of {header.path.name}")
    tokenizer, ids = gguf_tokenizer.build(header)
    return HuggingFace(tokenizer, **ids)


def _package(what: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(_MISSING.format(what=what, package="tokenizers")) from error
    return tokenizers


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
    add_bos: bool = dataclasses.field(default=True, init=False)
    stops: tuple[int, ...] = dataclasses.field(default=(256,), init=False)
    special_ids: frozenset[int] = dataclasses.field(default=frozenset({256}), init=False)

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_aligned(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(text)
        return ids, np.ones_like(ids)

    def decode(self, ids: Sequence[int] | np.ndarray, special: bool = False) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


class HuggingFace:
    """A tokenizer of the `tokenizers` package, with what its file does not say about special ids.

    `stops` are ids beside `eos` at which a text ends; special tokens with a usual name for that
    (`<|im_end|>`, `<|eot_id|>`, ...) are added.
    """

    def __init__(
        self, tokenizer: Any, *, bos: int, eos: int, add_bos: bool, stops: Iterable[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()  # settings of a file that would lose or add tokens
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # special tokens in a text are text
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos, self.eos, self.add_bos = bos, eos, add_bos
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        usual = [i for i in sorted(self.special_ids) if added[i].content in _STOP_NAMES]
        self.stops = tuple(dict.fromkeys([eos, *stops, *usual]))
        self._added = {i: token.content for i, token in added.items()}

    @classmethod
    def read(cls, path: Path) -> "HuggingFace":
        """The tokenizer of a `tokenizer.json`.

        First and last token are those of the `tokenizer_config.json` beside the file; where that
        says nothing, special tokens with a usual name (`<s>`, `</s>`, `<|endoftext|>`, ...).
        Without a first token the last one serves as both, as in GPT-2. Further stops are those of a
        `generation_config.json`.
        """
        tokenizers = _package("tokenizer.json")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise DataError(f"data.tokenizer: {path} is not a tokenizer.json: {error}") from None
        bos, eos = _special_ids(tokenizer, path)
        framed = tokenizer.encode("").ids  # with what the file puts around a text
        stops = _read_config(path.with_name("generation_config.json")).get("eos_token_id") or []
        return cls(
            tokenizer,
            bos=bos,
            eos=eos,
            add_bos=framed[:1] == [bos],
            stops=[stops] if isinstance(stops, int) else stops,
        )

    def __reduce__(self):  # anew, for the settings that are not pickled with the tokenizer
        make = functools.partial(
            HuggingFace, bos=self.bos, eos=self.eos, add_bos=self.add_bos, stops=self.stops
        )
        return make, (self._tokenizer,)

    def save(self, folder: Path, chat_template: str = "") -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, as transformers reads them."""
        self._tokenizer.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._tokenizer.id_to_token(self.bos),
            "eos_token": self._tokenizer.id_to_token(self.eos),
            "clean_up_tokenization_spaces": False,
            **({"chat_template": chat_template} if chat_template else {}),
        }
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        tokenizer = self._with_special if special else self._tokenizer
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    @functools.cached_property
    def _with_special(self) -> Any:
        """A copy that reads special tokens in a text; to change a setting is not for threads."""
        copy = pickle.loads(pickle.dumps(self._tokenizer))
        copy.encode_special_tokens = False
        return copy

    def encode_aligned(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ends = np.array([end for _, end in encoding.offsets], np.int64)
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        bytes_before = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
        counts = _bytes_between(bytes_before[ends], int(bytes_before[-1]))
        return np.array(encoding.ids, np.int32), counts

    def decode(self, ids: Sequence[int] | np.ndarray, special: bool = False) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not special)

    def token_bytes(self, token: int) -> bytes:
        token = int(token)
        content = self._tokenizer.id_to_token(token)
        if token in self.special_ids or content is None:  # a gap in the vocabulary
            return b""
        if token in self._added:
            return self._added[token].encode("utf-8")
        if "ByteLevel" in self._decoders:
            table = _byte_of_character()
            known = all(character in table for character in content)
            return bytes(map(table.__getitem__, content)) if known else content.encode("utf-8")
        if "ByteFallback" in self._decoders and (byte := _BYTE.fullmatch(content)):
            return bytes([int(byte[1], 16)])
        if "BPEDecoder" in self._decoders:  # a mark at the end of words is a blank, but at the end
            return self.decode([token, token]).removesuffix(self.decode([token])).encode("utf-8")
        anchor, text = self._anchor
        return self.decode([anchor, token]).removeprefix(text).encode("utf-8")

    @functools.cached_property
    def _decoders(self) -> set[str]:
        """The kinds of the steps by which tokens become text."""
        decoder = json.loads(self._tokenizer.to_str())["decoder"] or {}
        return {step["type"] for step in decoder.get("decoders", [decoder]) if step}

    @functools.cached_property
    def _anchor(self) -> tuple[int, str]:
        """A token that another can follow, and its text."""
        for token in range(self.vocab_size):
            text = self.decode([token])
            if text.isalpha() and self.decode([token, token]).startswith(text):
                return token, text
        raise DataError("data.tokenizer: no token of this vocabulary is a word: give 'bytes'")


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The byte each character of a byte-level vocabulary stands for (GPT-2, Radford et al., 2019).

    Bytes that print as Latin-1 are themselves, the others the characters from U+0100 on.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(b): b for b in printed} | {chr(0x100 + i): b for i, b in enumerate(others)}


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
        self.add_bos = self._model.bos_id() >= 0
        self.bos = self._model.bos_id() if self.add_bos else self.eos
        special = {
            self._model.id_to_piece(i): i
            for i in range(self.vocab_size)
            if self._model.is_control(i)
        }
        self.special_ids = frozenset(special.values())
        usual = [special[name] for name in _STOP_NAMES if name in special]
        self.stops = tuple(dict.fromkeys([self.eos, *usual]))
        self._special = special

    def __reduce__(self):
        return SentencePiece, (self._path,)

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        if not special:
            return np.array(self._model.encode(text), np.int32)
        ids = []
        for part in re.split(f"({'|'.join(map(re.escape, self._special))})", text):
            ids += [self._special[part]] if part in self._special else self._model.encode(part)
        return np.array(ids, np.int32)

    def encode_aligned(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        pieces = self._model.encode(text, return_type="proto").pieces
        # Lengths of the stretches of text, not their ends: releases differ in the unit of those.
        ends = np.cumsum([len(piece.surface.encode("utf-8")) for piece in pieces], dtype=np.int64)
        counts = _bytes_between(ends, len(text.encode("utf-8")))
        return np.array([piece.id for piece in pieces], np.int32), counts

    def decode(self, ids: Sequence[int] | np.ndarray, special: bool = False) -> str:
        if not special:
            return self._model.decode([int(i) for i in ids])
        groups = itertools.groupby(map(int, ids), self.special_ids.__contains__)
        return "".join(
            "".join(map(self._model.id_to_piece, group)) if known else self._model.decode([*group])
            for known, group in groups
        )

    def token_bytes(self, token: int) -> bytes:
        token = int(token)
        if token in self.special_ids:
            return b""
        piece = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(_BYTE.fullmatch(piece)[1], 16)])
        if self._model.is_unknown(token):
            return self._model.decode([token]).encode("utf-8")
        return piece.replace("\u2581", " ").encode("utf-8")


def _bytes_between(ends: np.ndarray, total: int) -> np.ndarray:
    """Bytes from each token's predecessor to its own end; the last token's end is the text's."""
    ends = np.maximum.accumulate(ends)
    ends[-1:] = total
    return np.diff(ends, prepend=0).astype(np.int32)
