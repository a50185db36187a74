"""Tokenizers in GGUF files, against those they were made from and against transformers."""

import json
import pathlib
import pickle
import sysconfig

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers as hf
import transformers
from hypothesis import given
from hypothesis import strategies as st

from lcm.data import tokenizers
from lcm.data.gguf_tokenizer import SPLITS
from lcm.errors import DataError

WORDS = ["the", "lazy", "naïve", "café", "dogs", "jumped", "over", "日本語", "and", "length", "🎉"]
LINES = [f"{a} {b}, {c}'s 12 {len(a)}" for a in WORDS for b in WORDS for c in WORDS]
CODE = pathlib.Path(json.__file__).read_text(encoding="utf-8")
TEXTS = [
    *(
        "",
        " ",
        "  the dogs",
        "the dogs ",
        "\n\n\tdogs\r\n ",
        "it's THE DOG'S 'll",
        "a1 22 333 4444",
    ),
    *(
        "naïve café 日本語 🎉🏳️‍🌈",
        "e\u0301 \u1e9b\u0323",
        "x" * 300,
        "\u00a0\u2009\u3000",
        "\x00\x7f",
    ),
    *("<|im_start|>user\nthe<|im_end|>", "<s>the</s>", "▁the ▁▁", "<0x41>", "   1  2", "don't3"),
    *(CODE[at : at + 90] for at in range(0, 2700, 90)),
]
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot|>"]


def write(path, change, architecture="llama"):
    writer = gguf.GGUFWriter(path, architecture)
    change(writer)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return path


def pieces(name):
    """The pre-tokenizer of a model's `tokenizer.json`, and its normalizer."""
    pre = hf.pre_tokenizers
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    qwen2 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def split(pattern):
        return pre.Sequence([pre.Split(hf.Regex(pattern), "isolated"), byte_level])

    return {
        "gpt-2": (pre.ByteLevel(add_prefix_space=False), None),
        "smollm": (
            pre.Sequence(
                [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
            ),
            None,
        ),
        "llama-bpe": (split(llama3), None),
        "qwen2": (split(qwen2), hf.normalizers.NFC()),
    }[name]


def train(name):
    """A byte-level tokenizer as published models have it."""
    made = hf.Tokenizer(hf.models.BPE(ignore_merges=name == "llama-bpe"))
    made.pre_tokenizer, normalizer = pieces(name)
    if normalizer:
        made.normalizer = normalizer
    made.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*LINES, *CODE.splitlines(keepends=True)], trainer)
    made.add_tokens([hf.AddedToken("<think>", normalized=False)])
    made.encode_special_tokens = True
    return made


def bpe(made, name, **ids):
    """Its metadata."""
    config = json.loads(made.to_str())
    by_id = {index: token for token, index in made.get_vocab(with_added_tokens=True).items()}
    added = {token["id"]: token["special"] for token in config["added_tokens"]}
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}

    def change(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_list([by_id[n] for n in range(len(by_id))])
        writer.add_token_types(
            [kinds[added[n]] if n in added else gguf.TokenType.NORMAL for n in range(len(by_id))]
        )
        writer.add_token_merges([" ".join(merge) for merge in config["model"]["merges"]])
        for key, index in ({"bos": 1, "eos": 2} | ids).items():
            getattr(writer, f"add_{key}_token_id")(index)

    return change


@pytest.fixture(scope="module", params=["gpt-2", "smollm", "llama-bpe", "qwen2"])
def pair(tmp_path_factory, request):
    """A tokenizer and what a GGUF file makes of it."""
    made = train(request.param)
    path = tmp_path_factory.mktemp("bpe") / "x.gguf"
    write(path, bpe(made, request.param, eot=3))
    return made, tokenizers.load(str(path)), request.param


def test_byte_level(pair):
    made, loaded, name = pair
    for text in TEXTS:
        assert loaded.encode(text).tolist() == made.encode(text).ids, text
        if name != "qwen2":  # which composes characters
            assert loaded.decode(loaded.encode(text)) == text
    assert loaded.vocab_size == made.get_vocab_size()
    assert (loaded.bos, loaded.eos, loaded.stops) == (1, 2, (2, 3, 0))
    assert loaded.special_ids == {0, 1, 2, 3}
    assert loaded.add_bos == (name == "llama-bpe")


@given(unicode_text)
def test_byte_level_of_any_text(pair, text):
    made, loaded, _ = pair
    ids = loaded.encode(text)
    assert ids.tolist() == made.encode(text).ids
    ids, counts = loaded.encode_aligned(text)
    assert counts.sum() == len(text.encode()) or not len(ids)


def test_special_tokens_and_those_added(pair):
    _, loaded, _ = pair
    text = "<|im_start|>the dogs<think>12<|im_end|>"
    ids = loaded.encode(text, special=True).tolist()
    assert ids[0] == 1 and ids[-1] == 2 and loaded.decode(ids, special=True) == text
    assert loaded.decode(ids) == "the dogs<think>12"
    thinking = loaded.encode("<think>").tolist()
    assert len(thinking) == 1 and loaded.token_bytes(thinking[0]) == b"<think>"
    assert not loaded.special_ids & set(loaded.encode(text).tolist())
    copy = pickle.loads(pickle.dumps(loaded))
    assert copy.encode(text, special=True).tolist() == ids and copy.stops == loaded.stops


def test_bytes_of_tokens(pair):
    _, loaded, name = pair
    for text in TEXTS:
        if name != "qwen2":
            assert b"".join(map(loaded.token_bytes, loaded.encode(text))) == text.encode()


def test_splits_differ(tmp_path):
    """The name of the split is read: the same tokens and merges, other ids."""
    made = train("gpt-2")
    ids = set()
    for name in ("gpt-2", "smollm", "llama-bpe"):
        path = write(tmp_path / f"{name}.gguf", bpe(made, name))
        ids.add(tuple(tokenizers.load(str(path)).encode("  12 dogs\n\n  3")))
    assert len(ids) == 3 and len(SPLITS) > 20


def spm(folder, **options):
    (folder / "text").write_text("\n".join(LINES[:300]) + CODE, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "small"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "small.model"))


def spm_metadata(model, **more):
    types, size = gguf.TokenType, model.get_piece_size()

    def kind(index):
        if model.is_unknown(index):
            return types.UNKNOWN
        if model.is_control(index):
            return types.CONTROL
        if model.is_byte(index):
            return types.BYTE
        return types.USER_DEFINED if model.id_to_piece(index) in USER else types.NORMAL

    def change(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([model.id_to_piece(n) for n in range(size)])
        writer.add_token_scores([model.get_score(n) for n in range(size)])
        writer.add_token_types([kind(n) for n in range(size)])
        writer.add_bos_token_id(model.bos_id())
        writer.add_eos_token_id(model.eos_id())
        for key, value in more.items():
            getattr(writer, f"add_{key}")(value)

    return change


USER = ["<turn>", "\n\n"]


@pytest.fixture(scope="module", params=["llama", "gemma"])
def spm_pair(tmp_path_factory, request):
    """A SentencePiece model, with a blank before a text or without, and its GGUF."""
    folder = tmp_path_factory.mktemp("spm")
    before = request.param == "llama"
    model = spm(folder, add_dummy_prefix=before, user_defined_symbols=[] if before else USER)
    change = spm_metadata(model, **({} if before else {"add_space_prefix": False}))
    path = write(folder / "x.gguf", change, request.param if before else "gemma2")
    return model, tokenizers.load(str(path))


def check_spm(model, loaded, text):
    ids = loaded.encode(text)
    assert ids.tolist() == model.encode(text), text
    assert loaded.decode(ids) == model.decode(ids.tolist()) == text
    joined = b"".join(map(loaded.token_bytes, ids)).decode()
    assert joined in (text, " " + text)


def test_sentencepiece(spm_pair):
    model, loaded = spm_pair
    for text in [*TEXTS, "a\n\nb\n\n\n<turn>c"]:
        if "▁" not in text and "<s>" not in text:
            check_spm(model, loaded, text)
    assert loaded.vocab_size == model.get_piece_size()
    assert (loaded.bos, loaded.eos, loaded.add_bos) == (model.bos_id(), model.eos_id(), True)
    ids = loaded.encode("<s>the dogs</s>", special=True).tolist()
    assert ids == [loaded.bos, *model.encode("the dogs"), loaded.eos]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\x00")))
def test_sentencepiece_of_any_text(spm_pair, text):
    check_spm(*spm_pair, text)


def test_what_is_no_tokenizer(tmp_path):
    def refused(change, match):
        with pytest.raises(DataError, match=match) as caught:
            tokenizers.load(str(write(tmp_path / "x.gguf", change)))
        assert "\n" not in str(caught.value)

    made = train("gpt-2")
    refused(bpe(made, "secret"), "splits text as 'secret' .*, and known are .*smollm")
    refused(bpe(made, "gpt-2", eos=10_000), r"no token for the end .*eos_token_id")
    refused(lambda writer: writer.add_tokenizer_model("bert"), "of kind 'bert', and 'gpt2' and")
    refused(lambda writer: None, "no metadata tokenizer.ggml.model")

    def no_merges(writer):
        bpe(made, "gpt-2")(writer)
        writer.kv_data[0]["tokenizer.ggml.merges"].value = ["zz qq"]

    refused(no_merges, "merges that do not fit")

    def few_types(writer):
        bpe(made, "gpt-2")(writer)
        writer.kv_data[0]["tokenizer.ggml.token_type"].value = [1, 1]

    refused(few_types, "601 tokens and not as many tokenizer.ggml.token_type")


def test_a_tokenizer_json_beside_the_file_counts(tmp_path):
    """The way out where a file's own tokenizer is of no known kind."""
    made = train("gpt-2")
    path = write(tmp_path / "x.gguf", bpe(made, "secret"))
    made.save(str(tmp_path / "tokenizer.json"))
    assert tokenizers.load(str(path)).encode("the 12").tolist() == made.encode("the 12").ids


def test_tokens_outside_of_the_byte_alphabet(tmp_path):
    """Decoded as they are written, as the byte-level decoder does."""

    def change(writer):
        bpe(train("gpt-2"), "gpt-2")(writer)
        for key, more in {"tokens": "<｜日｜>", "token_type": 1}.items():
            writer.kv_data[0][f"tokenizer.ggml.{key}"].value.append(more)

    loaded = tokenizers.load(str(write(tmp_path / "x.gguf", change)))
    assert loaded.token_bytes(601).decode() == loaded.decode([601]) == "<｜日｜>"
    assert loaded.token_bytes(9999) == b""  # no token


# --- the real file ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    from lcm.pretrained import names

    try:
        return names.find("smollm2-135m")
    except Exception as error:
        pytest.skip(str(error))


def many_texts():
    """Some thousands: the standard library in stretches, and texts made to be awkward."""
    found = list(TEXTS)
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    for file in sorted(folder.glob("*.py"))[:150]:
        code = file.read_text(encoding="utf-8", errors="ignore")
        found += [code[at : at + 400] for at in range(0, min(len(code), 12_000), 400)]
    rng = np.random.default_rng(0)
    alphabet = [
        " ",
        "  ",
        "\n",
        "\t",
        "'s",
        "é",
        "日",
        "🎉",
        "a",
        "B",
        "7",
        "42",
        "<|im_end|>",
        ".",
    ]
    found += ["".join(rng.choice(alphabet, 24)) for _ in range(1000)]
    ranges = [(0x20, 0x250), (0x370, 0x700), (0x900, 0xE00), (0x2000, 0x2C00), (0x1F300, 0x1FAFF)]
    for low, high in ranges:
        found += ["".join(map(chr, rng.integers(low, high, 20))) for _ in range(300)]
    return found


@pytest.mark.slow
def test_the_real_tokenizer(real):
    """Ids of transformers on thousands of strings; digits apart as the model's tokenizer.json says.

    transformers does not know the split `smollm` and takes GPT-2's, which keeps a blank with the
    digit after it: its pre-tokenizer is replaced by the published one.
    """
    loaded = tokenizers.load(str(real))
    theirs = transformers.AutoTokenizer.from_pretrained(real.parent, gguf_file=real.name)
    backend = theirs.backend_tokenizer
    texts = many_texts()
    assert len(texts) > 4000
    plain = [text for text in texts if not any(c.isnumeric() for c in text)]
    assert len(plain) > 2000
    for text in plain:
        wanted = theirs.encode(text, add_special_tokens=False)
        assert loaded.encode(text, special=True).tolist() == wanted, text
    backend.pre_tokenizer = pieces("smollm")[0]
    for text in texts:
        ids = loaded.encode(text, special=True)
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False), text
        assert loaded.decode(ids, special=True) == text
        assert b"".join(map(loaded.token_bytes, loaded.encode(text))) == text.encode()
    assert (theirs.bos_token_id, theirs.eos_token_id) == (loaded.bos, loaded.eos) == (1, 2)
    assert loaded.stops == (2, 0) and len(loaded.special_ids) == 17 and not loaded.add_bos
