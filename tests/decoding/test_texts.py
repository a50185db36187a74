"""Texts from prompts: what ends them, how many there are, and what is refused."""

import numpy as np
import pytest

from lcm.data import tokenizers
from lcm.decoding import beam_search, generate, programs, stream
from lcm.errors import UserError

from . import tiny

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
NO_LETTERS = tuple(i for i in range(257) if not 97 <= i <= 122)


def writer(*assignments: str):
    """A model of bytes with a chat template."""
    model = tiny.model("model.vocab=257", "data.length=64", *assignments)
    return model._replace(tokenizer=tokenizers.load("bytes"), chat_template=CHATML)


def letters(prompts, **options):
    """Texts of small letters alone."""
    return generate(writer(), prompts, **{"max_new_tokens": 12, "banned": NO_LETTERS, **options})


def test_stop_strings_over_tokens():
    (whole,) = letters("hello", seed=1)
    assert len(whole.text) == 12 and whole.finish_reason == "length"
    for at, size in ((0, 1), (3, 4), (8, 4)):
        stop = whole.text[at : at + size]
        begins = whole.text.index(stop)
        (text,) = letters("hello", seed=1, stop=["!!", stop])
        assert text.text == whole.text[:begins] and text.finish_reason == "stop"
        assert text.tokens == whole.tokens[: begins + size]
    (text,) = letters("hello", seed=1, stop=whole.text[-1] + "!")  # held back, then shown
    assert text.text == whole.text and text.finish_reason == "length"


def test_stop_ids_are_no_text():
    (whole,) = letters("hello", seed=1)
    first = whole.tokens.index(whole.tokens[5])
    (text,) = letters("hello", seed=1, stop_ids=[whole.tokens[5]])
    assert text.text == whole.text[:first] and text.tokens == whole.tokens[: first + 1]
    assert text.finish_reason == "stop"
    end = [i for i in range(256) if i != 100]
    (text,) = generate(writer(), "a", banned=[*end, 100 + 0], max_new_tokens=5)
    assert text.tokens == (256,) and text.text == "" and text.finish_reason == "stop"


def test_samples_come_likeliest_first():
    prompts = ["one", [{"role": "user", "content": "two"}], tiny.tokens(4)]
    found = letters(prompts, n=3, seed=5)
    assert [g.prompt for g in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for own in (found[:3], found[3:6], found[6:]):
        assert [g.score for g in own] == sorted((g.score for g in own), reverse=True)
        assert len({g.tokens for g in own}) == 3
    alone = [letters("one", seed=seed)[0].tokens for seed in (5, 6, 7)]
    assert {*alone} == {g.tokens for g in found[:3]}


def test_seeds_begin_again_at_the_last():
    two = letters("one", n=2, seed=2**32 - 1)
    assert {g.tokens for g in two} == {letters("one", seed=s)[0].tokens for s in (2**32 - 1, 0)}


def test_logprobs_are_of_what_was_drawn_from():
    (text,) = letters("hello", seed=1)
    assert all(raw < own < 0 for raw, own in zip(text.raw_logprobs, text.logprobs, strict=True))
    (text,) = letters("hello", temperature=0.0)
    assert {*text.logprobs} == {0.0} and text.score == sum(text.raw_logprobs)


def test_a_stream_is_the_text():
    pieces = [*stream(writer(), "hello", seed=1, banned=NO_LETTERS, max_new_tokens=12)]
    assert len(pieces) == 12 and "".join(pieces) == letters("hello", seed=1)[0].text


def test_events_count_from_prompt_to_prompt():
    seen = []
    found = letters(["a", "b"], n=2, rows=3, on_event=seen.append)
    assert sorted({event.request for event in seen}) == [0, 1, 2, 3]
    assert sum(len(g.tokens) for g in found) == len(seen) == 48


def test_one_prompt_in_any_form():
    chat = [{"role": "user", "content": "hi"}]
    text = "<user>hi"
    ids = tokenizers.load("bytes").encode(text)
    forms = [chat, [chat], ids, [ids], [*map(int, ids)], ids.astype(np.int64)]
    found = [letters(form, seed=3, max_new_tokens=6) for form in forms]
    assert all(len(own) == 1 and own[0] == found[0][0] for own in found)
    with_bos = letters(text, seed=3, max_new_tokens=6)
    assert with_bos == letters([256, *ids], seed=3, max_new_tokens=6) != found[0]
    (searched,) = beam_search(writer(), chat, beams=2, max_new_tokens=3)
    assert len(searched.tokens) == 3


def test_a_model_without_a_tokenizer():
    model = tiny.model()
    (found,) = generate(model, [1, 2, 3], max_new_tokens=4)
    assert found.text == "" and len(found.tokens) == 4
    (searched,) = beam_search(model, [1, 2, 3], beams=2, max_new_tokens=4)
    assert searched.text == ""


NAN = float("nan")
REFUSED = {
    "no tokenizer": ("hello", {}, "came without a tokenizer: give token ids"),
    "no tokenizer, chat": ([{"role": "user", "content": "a"}], {}, "came without a tokenizer"),
    "stop": ([1], {"stop": "a"}, "stop=.* cannot be found without a tokenizer: use stop_ids"),
    "no ids": ([[]], {}, "prompt 0 is empty: give it a word"),
    "second": ([[1], [2, 40]], {}, "prompt 1 has token 40: ids of this model are 0 to 39"),
    "negative": ([1, -1], {}, "prompt 0 has token -1: ids of this model are 0 to 39"),
    "huge": ([1, 1 << 33], {}, f"prompt 0 has token {1 << 33}"),
    "fractions": ([1.5, 2.0], {}, r"prompt 0 is float64 \(2,\): give a text or a list of ids"),
    "truths": ([True, False], {}, "prompt 0 is bool"),
    "nested": ([[[1], [2]]], {}, r"prompt 0 is int64 \(2, 1\)"),
    "ragged": ([[[1], [2, 3]]], {}, "prompt 0 is object"),
    "nothing": ([None], {}, "prompt 0 is object"),
    "n": ([1], {"n": 0}, "n=0 must be at least 1"),
    "name": ([1], {"temprature": 1}, "temprature=1 is no setting: those are banned, stop_ids"),
    "policy": ([1], {"full": "slid"}, "full='slid' is unknown: choose from refuse, slide, config"),
    "long": ([1, 2], {"max_new_tokens": 31}, "33 tokens .* exceed the context of 32: lower"),
    "temperature": ([1], {"temperature": -1}, "temperature=-1 must be at least 0"),
    "nan": ([1], {"temperature": NAN}, "temperature=nan must be at least 0"),
    "text": ([1], {"temperature": "hot"}, "temperature='hot' must be a number"),
    "truth": ([1], {"top_k": True}, "top_k=True must be a whole number"),
    "fraction": ([1], {"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a whole number"),
    "big": ([1], {"top_k": 1 << 40}, f"top_k={1 << 40} must be a whole number below 2"),
    "none": ([1], {"seed": None}, "seed=None must be a whole number"),
    "digits": ([1], {"stop_ids": "12"}, "stop_ids='12' must be a list of token ids"),
    "one id": ([1], {"stop_ids": 12}, "stop_ids=12 must be a list of token ids"),
    "words": ([1], {"banned": ["a"]}, r"banned=\['a'\] must be a list of token ids"),
    "rows": ([1], {"rows": 0}, "rows=0 must be at least 1"),
    "cache": ([1], {"engine": {"cache": "book"}}, "cache='book' is unknown"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_sentence_before_anything_is_compiled(name, monkeypatch):
    prompt, options, says = REFUSED[name]
    monkeypatch.setattr(programs, "prefill", None)
    monkeypatch.setattr(programs, "step", None)
    with pytest.raises(UserError, match=says) as error:
        generate(tiny.model(), prompt, **{"max_new_tokens": 4, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "stop", "says"),
    [
        ("a\ud800", (), "half of a surrogate pair at character 1"),
        ("a", ["b", ""], "a stop string is empty"),
        ([{"role": "usr", "content": "a"}], (), "message 0 has role 'usr'"),
    ],
)
def test_texts_that_are_none(prompt, stop, says):
    with pytest.raises(UserError, match=says):
        generate(writer(), prompt, stop=stop, max_new_tokens=4)


def test_numbers_of_numpy_are_settings():
    options = {
        "max_new_tokens": np.int64(3),
        "temperature": np.float32(0),
        "stop_ids": np.arange(2),
    }
    assert len(generate(tiny.model(), [1, 2], **options)[0].tokens) == 3
    assert generate(tiny.model(), []) == []
