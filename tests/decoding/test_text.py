"""Streams of text against the text as a whole, over kinds of tokenizers."""

import dataclasses

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm.data import tokenizers
from lcm.decoding.text import TextStream
from lcm.errors import UserError

WORDS = ["the", "lazy", "naïve", "café", "dogs", "jumped", "日本語", "and", "🎉"]
LINES = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]


def byte_level(folder):
    raw = hf.Tokenizer(hf.models.BPE())
    raw.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(LINES, trainer)
    raw.save(str(folder / "tokenizer.json"))
    return tokenizers.load(str(folder))


def end_of_word(folder):
    raw = hf.Tokenizer(hf.models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    raw.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    raw.decoder = hf.decoders.BPEDecoder(suffix="</w>")
    trainer = hf.trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "</s>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    raw.train_from_iterator(LINES, trainer)
    raw.save(str(folder / "tokenizer.json"))
    return tokenizers.load(str(folder))


def piece(folder, **options):
    (folder / "text").write_text("\n".join(LINES), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "small"),
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return tokenizers.load(str(folder / "small.model"))


KINDS = {
    "bytes": lambda folder: tokenizers.load("bytes"),
    "task": lambda folder: tokenizers.load("task:addition"),
    "byte-level": byte_level,
    "end of word": end_of_word,
    "pieces": lambda folder: piece(folder, vocab_size=80),
    "pieces of bytes": lambda folder: piece(folder, vocab_size=320, byte_fallback=True),
    "pieces, blanks kept": lambda folder: piece(
        folder, vocab_size=80, remove_extra_whitespaces=False
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


def streamed(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, stop)
    parts = [stream.push(token) for token in ids]
    return "".join([*parts, stream.finish()]), parts, stream


def whole(tokenizer, ids):
    """`decode`, but for pieces of bytes, which have a U+FFFD for each byte of a broken character.

    Only how many there are in a row differs then.
    """
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", errors="replace")
    text = tokenizer.decode(ids)
    if "\ufffd" in text and not isinstance(tokenizer, tokenizers.Bytes):
        blanks = len(text) - len(text.lstrip(" "))
        return " " * blanks + joined.lstrip(" ")
    return text


some = st.lists(st.integers(0, 10**6), max_size=20)
quick = settings(deadline=None, max_examples=80)


@quick
@given(some)
def test_parts_are_the_whole(tokenizer, numbers):
    ids = [number % tokenizer.vocab_size for number in numbers]
    text, parts, stream = streamed(tokenizer, ids)
    assert text == whole(tokenizer, ids)
    assert not stream.stopped and "".join(parts) == text[: len("".join(parts))]


def test_text_comes_as_soon_as_it_can(tokenizer):
    """All that was pushed is shown, but for a character that is incomplete and a last blank."""
    of_task = tokenizer.vocab_size < 40
    ids = tokenizer.encode("12+34=46" if of_task else "the lazy dogs and 日本語 jumped")
    stream, shown = TextStream(tokenizer), ""
    for count, token in enumerate(ids, 1):
        shown += stream.push(token)
        text = tokenizer.decode(ids[:count])
        assert text.rstrip("\ufffd").removesuffix(" ") == shown
    assert shown + stream.finish() == tokenizer.decode(ids)


letters = st.text("ab ", max_size=12)
stops = st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3)


@dataclasses.dataclass
class Letters:
    """Tokens of one to three letters; none starts with a blank that is dropped."""

    tokens: tuple[str, ...]

    def token_bytes(self, token):
        return self.tokens[token].encode()

    def decode(self, ids):
        return "".join(self.tokens[token] for token in ids)


@quick
@given(st.lists(st.text("ab ", min_size=1, max_size=3), max_size=8), stops)
def test_text_ends_where_the_first_stop_string_begins(parts, stop):
    """However text and stop strings are cut into tokens."""
    tokenizer = Letters(tuple(parts))
    text = "".join(parts)
    want = min((at for s in stop if (at := text.find(s)) >= 0), default=None)
    got, _, stream = streamed(tokenizer, range(len(parts)), stop)
    assert got == text[:want]
    assert stream.stopped == (want is not None)


def test_several_stop_strings_that_overlap():
    letters = tokenizers.load("bytes")
    cases = {
        ("abcd", "bc"): ("xx", "xxabcdyy", 6),  # the first to begin, though the last to end
        ("abce", "bc"): ("xxa", "xxabcdyy", 6),  # known once the other cannot be
        ("aab",): ("a", "aaabb", 4),
        ("ab", "abab"): ("", "ababab", 2),
        ("\n\n", "\nQ:"): ("A", "A\nQ: B\n\n", 4),
        ("é",): ("caf", "café!", 5),  # a character of two tokens
    }
    for stop, (want, text, tokens) in cases.items():
        ids = list(text.encode())
        got, _, stream = streamed(letters, ids, stop)
        assert (got, stream.stopped) == (want, True)
        stream = TextStream(letters, stop)
        stopped = [bool(stream.push(token) or stream.stopped) and stream.stopped for token in ids]
        assert stopped.index(True) == tokens - 1, stop
        assert stream.push(ord("z")) == stream.finish() == ""


def test_what_might_become_a_stop_string_is_held_back():
    stream = TextStream(tokenizers.load("bytes"), "END")
    assert [stream.push(token) for token in b"aENENx"] == ["a", "", "", "EN", "", "ENx"]
    assert [stream.push(token) for token in b"EN"] == ["", ""]
    assert stream.finish() == "EN" and not stream.stopped


def test_bytes_that_are_no_text():
    letters = tokenizers.load("bytes")
    for data in (b"\xe6\x97a", b"\xff\xfe", b"a\xf0\x9f\x8e", b"\xf0\x9f\x8e\x89", b"\xe6\xe6\x97"):
        assert streamed(letters, list(data))[0] == data.decode("utf-8", errors="replace")
    assert streamed(letters, [104, 256, 105])[0] == "hi"  # a special token is no text


def test_empty_stop_strings_are_refused():
    with pytest.raises(UserError, match="stop string is empty"):
        TextStream(tokenizers.load("bytes"), ("a", ""))


def test_long_streams_cost_the_same_per_token():
    """Nothing is decoded anew: a tokenizer that counts is asked once at the beginning."""

    class Counting(tokenizers.Bytes):
        asked = 0

        def decode(self, ids, special=False):
            Counting.asked += len(ids)
            return super().decode(ids, special)

    text = "words and words " * 200
    assert streamed(Counting(), np.frombuffer(text.encode(), np.uint8))[0] == text
    assert Counting.asked < len(text) + 10
