"""Tokenizers: trained here on a few lines, so that nothing is downloaded."""

import json
import pickle

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import given
from hypothesis import strategies as st

from lcm.data import tokenizers
from lcm.errors import DataError

WORDS = ["the", "lazy", "naïve", "café", "dogs", "jumped", "over", "日本語", "and", "length", "🎉"]
LINES = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]
TEXT = "the quick brown fox jumps over the lazy dog, naïve café, 日本語 and 🎉\n"
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))


def write_bpe(path, special, length=None):
    """A byte-level BPE as GPT-2's; `length` adds a truncation that must be ignored."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if length:
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length)
    tokenizer.save(str(path))
    return path


def write_sentencepiece(folder, **options):
    (folder / "text").write_text("\n".join(LINES), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "small"),
        minloglevel=2,
        hard_vocab_limit=False,
        **{"vocab_size": 80} | options,
    )
    return folder / "small.model"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    return tokenizers.load(str(write_bpe(path, ["<s>", "</s>"], length=4)))


@pytest.fixture(scope="module", params=["unigram", "byte_fallback"])
def piece(tmp_path_factory, request):
    options = {"byte_fallback": True, "vocab_size": 320} if request.param == "byte_fallback" else {}
    folder = tmp_path_factory.mktemp("piece")
    return tokenizers.load(str(write_sentencepiece(folder, **options)))


def test_bytes_by_hand():
    tokenizer = tokenizers.load("bytes")
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (257, 256, 256)
    ids = tokenizer.encode("aé")
    assert ids.dtype == np.int32 and ids.tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.decode([256, 97, 0xC3, 0xA9, 256]) == "aé"
    assert tokenizer.decode(np.array([0xC3, 97])) == "\ufffda"


@given(unicode_text)
def test_byte_level_tokenizers_lose_nothing(bpe, text):
    for tokenizer in (tokenizers.load("bytes"), bpe):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(unicode_text)
def test_bytes_of_tokens_add_up(bpe, piece, text):
    for tokenizer in (tokenizers.load("bytes"), bpe, piece):
        ids, counts = tokenizer.encode_aligned(text)
        assert ids.dtype == counts.dtype == np.int32 and ids.shape == counts.shape
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert (counts >= 0).all() and (ids < tokenizer.vocab_size).all()
        if len(ids):  # a normaliser may leave nothing of a text of blanks
            assert counts.sum() == len(text.encode())


def test_bytes_of_each_token_where_tokens_are_pieces_of_text(bpe, piece):
    text = "the lazy naïve dogs"
    for tokenizer in (bpe, piece):
        ids, counts = tokenizer.encode_aligned(text)
        stretches = np.split(np.frombuffer(text.encode(), np.uint8), np.cumsum(counts)[:-1])
        decoded = [tokenizer.decode([i]).strip() for i in ids]
        assert len(ids) < len(text)  # some tokens are longer than a character
        for token, stretch in zip(decoded, stretches, strict=True):
            if "\ufffd" not in token and "ï" not in token:
                assert bytes(stretch).decode(errors="ignore").strip() == token


def test_special_tokens_in_a_text_are_text(bpe, piece):
    for tokenizer in (bpe, piece):
        ids = tokenizer.encode("a</s><s>b")
        assert tokenizer.eos not in ids and tokenizer.bos not in ids
        assert (
            tokenizer.decode([tokenizer.bos, *tokenizer.encode("the dogs"), tokenizer.eos])
            == "the dogs"
        )


def test_special_tokens_of_a_text_that_was_made_with_them(bpe, piece):
    for tokenizer in (bpe, piece):
        ids = tokenizer.encode("<s>the dogs</s>", special=True)
        middle = tokenizer.encode("the dogs")
        assert ids.tolist() == [tokenizer.bos, *middle, tokenizer.eos]
        assert tokenizer.decode(ids, special=True) == "<s>the dogs</s>"
        assert tokenizer.decode(ids) == "the dogs"
        assert {tokenizer.bos, tokenizer.eos} <= tokenizer.special_ids
        assert tokenizer.special_ids.isdisjoint(middle) and tokenizer.stops == (tokenizer.eos,)
        assert tokenizer.eos not in tokenizer.encode("a</s>")  # the reading of special is no state


def joined(tokenizer, ids):
    return b"".join(map(tokenizer.token_bytes, ids))


@given(unicode_text)
def test_bytes_of_tokens_are_the_text(bpe, piece, text):
    for tokenizer in (tokenizers.load("bytes"), bpe):
        ids = tokenizer.encode(text)
        assert joined(tokenizer, ids) == text.encode()
        assert joined(tokenizer, [tokenizer.bos, *ids, tokenizer.eos]) == text.encode()
    text = joined(piece, ids := piece.encode(text)).decode()
    assert piece.decode(ids) in (text, text.removeprefix(" "))


@pytest.mark.parametrize("kind", ["metaspace", "wordpiece", "suffix", "words"])
def test_bytes_of_tokens_of_other_kinds(tmp_path, kind):
    """Decoders that join tokens by a rule of their own: the bytes are what follows in a text."""
    models, pre, decoders = hf.models, hf.pre_tokenizers, hf.decoders
    model, before, after, trainer = {
        "metaspace": (
            models.BPE(byte_fallback=True, unk_token="<unk>"),
            pre.Metaspace(),
            decoders.Sequence(
                [
                    decoders.Replace("▁", " "),
                    decoders.ByteFallback(),
                    decoders.Fuse(),
                    decoders.Strip(" ", 1, 0),
                ]
            ),
            hf.trainers.BpeTrainer,
        ),
        "wordpiece": (
            models.WordPiece(unk_token="<unk>"),
            pre.Whitespace(),
            decoders.WordPiece(),
            hf.trainers.WordPieceTrainer,
        ),
        "suffix": (
            models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
            pre.Whitespace(),
            decoders.BPEDecoder(suffix="</w>"),
            lambda **kw: hf.trainers.BpeTrainer(end_of_word_suffix="</w>", **kw),
        ),
        "words": (
            models.WordLevel(unk_token="<unk>"),
            pre.Whitespace(),
            None,
            hf.trainers.WordLevelTrainer,
        ),
    }[kind]
    raw = hf.Tokenizer(model)
    raw.pre_tokenizer = before
    if after:
        raw.decoder = after
    special = ["<unk>", "<s>", "</s>"]
    if kind == "metaspace":
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    raw.train_from_iterator(
        LINES, trainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    config = json.loads(raw.to_str())
    config["added_tokens"] = [
        t for t in config["added_tokens"] if not t["content"].startswith("<0")
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    tokenizer = tokenizers.load(str(tmp_path))
    text = "the lazy dogs jumped over naïve café"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert joined(tokenizer, ids).decode().strip(" ") == text
    assert tokenizer.decode(ids[:1]) == "the"
    rest = joined(tokenizer, ids[1:]).decode()
    assert rest == ("lazy dogs jumped over naïve café " if kind == "suffix" else text[3:])
    if kind == "metaspace":
        ids = tokenizer.encode("the ß🦖")
        assert joined(tokenizer, ids).decode() == " the ß🦖" and len(ids) >= 6


def test_bytes_of_words_have_the_blank_between(tmp_path):
    words = tokenizers.load("task:addition")
    ids = words.encode("12+3=")
    assert joined(words, [words.bos, *ids]).decode().removeprefix(" ") == words.decode(ids)
    assert words.special_ids == {0, 1} and words.stops == (words.eos,)


def test_where_generation_stops(tmp_path):
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<stop>", "</s>"]
    path = write_bpe(tmp_path / "tokenizer.json", special)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert tokenizers.load(str(path)).stops == (2, 0, 4)
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [3, 2]}))
    assert tokenizers.load(str(path)).stops == (2, 3, 0, 4)
    generation.write_text(json.dumps({"eos_token_id": 3}))
    assert pickle.loads(pickle.dumps(tokenizers.load(str(path)))).stops == (2, 3, 0, 4)


def test_what_a_file_puts_before_a_text(tmp_path):
    path = write_bpe(tmp_path / "tokenizer.json", ["<s>", "</s>"])
    assert not tokenizers.load(str(path)).add_bos
    raw = hf.Tokenizer.from_file(str(path))
    raw.post_processor = hf.processors.TemplateProcessing("<s> $0", special_tokens=[("<s>", 0)])
    raw.save(str(path))
    assert tokenizers.load(str(path)).add_bos
    assert tokenizers.load(str(path)).encode("the").tolist() == raw.encode("the").ids[1:]


def test_the_file_cannot_truncate(bpe):
    assert len(bpe.encode(TEXT)) > 4 and len(bpe.encode("a")) == 1


def test_tokenizers_go_to_workers(bpe, piece):
    for tokenizer in (bpe, piece, tokenizers.load("bytes")):
        copy = pickle.loads(pickle.dumps(tokenizer))
        for text in (TEXT, "a</s>"):
            np.testing.assert_array_equal(copy.encode(text), tokenizer.encode(text))
        assert (copy.bos, copy.eos) == (tokenizer.bos, tokenizer.eos)


def test_first_and_last_token_of_a_tokenizer_json(tmp_path):
    path = write_bpe(tmp_path / "tokenizer.json", ["<pad>", "<|endoftext|>", "<go>", "</s>"])
    only_last = tokenizers.load(str(path))
    assert (only_last.bos, only_last.eos) == (3, 3)  # </s> is the usual name that comes first
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<go>"}, "eos_token": "<|endoftext|>"}))
    named = tokenizers.load(str(tmp_path))
    assert (named.bos, named.eos) == (2, 1)
    config.write_text(json.dumps({"bos_token": None, "eos_token": "<none>"}))
    with pytest.raises(DataError, match="eos_token '<none>' is not a token"):
        tokenizers.load(str(path))
    config.write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be read"):
        tokenizers.load(str(path))


def test_sentencepiece_without_first_token(tmp_path):
    tokenizer = tokenizers.load(str(write_sentencepiece(tmp_path, bos_id=-1)))
    assert tokenizer.bos == tokenizer.eos >= 0
    with pytest.raises(DataError, match="no token for the end"):
        tokenizers.load(str(write_sentencepiece(tmp_path, eos_id=-1)))


def test_what_cannot_be_loaded(tmp_path):
    def refused(spec, match):
        with pytest.raises(DataError, match=match) as caught:
            tokenizers.load(str(spec))
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none.json", "does not exist")
    refused(tmp_path, "neither tokenizer.json nor tokenizer.model")
    for name, match in [
        ("a.txt", "of no known kind"),
        ("a.json", "not a tokenizer.json"),
        ("a.model", "not a SentencePiece model"),
    ]:
        (tmp_path / name).write_text("junk")
        refused(tmp_path / name, match)
    refused(
        write_bpe(tmp_path / "b.json", ["<pad>"]), "no token for the end of a document.*eos_token"
    )


def test_offsets_that_step_back_count_no_byte_twice():
    """Ends 3, 2, 5 of six bytes: the second token adds none, the last has what is left over."""
    assert tokenizers._bytes_between(np.array([3, 2, 5]), 6).tolist() == [3, 0, 3]
    assert tokenizers._bytes_between(np.array([], np.int64), 6).tolist() == []
