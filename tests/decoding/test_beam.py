"""Beam search against every text there is, against greedy steps, and against transformers."""

import itertools

import numpy as np
import pytest

from lcm.decoding import Engine, beam_search, generate
from lcm.errors import UserError
from lcm.pretrained import save_folder

from . import tiny

V, MOST = 4, 3
TOY = ("model.vocab=4",)


def rank(text, penalty: float) -> float:
    return text.score / len(text.tokens) ** penalty


def every_text(model, prompt, stops) -> dict[tuple[int, ...], float]:
    """log P of all texts of MOST tokens, and of those that end before."""
    texts = {
        text[: next((i + 1 for i, t in enumerate(text) if t in stops), MOST)]
        for text in itertools.product(range(V), repeat=MOST)
    }
    texts = sorted(texts)
    rows = [np.array([*prompt, *text[:-1]], np.int32) for text in texts]
    found = tiny.logprobs(model, rows)
    places = range(len(prompt) - 1, len(prompt) + MOST)
    return {
        text: sum(own[at][token] for at, token in zip(places, text, strict=False))
        for text, own in zip(texts, found, strict=True)
    }


@pytest.mark.quick("stops0-1.0", "stops2--0.7")
@pytest.mark.parametrize("penalty", [1.0, 0.0, -0.7, 2.0])
@pytest.mark.parametrize("stops", [(1,), pytest.param((), marks=pytest.mark.slow), (1, 2)])
def test_as_many_beams_as_texts_find_the_best(stops, penalty):
    model, prompt = tiny.model(*TOY), [3, 0, 2]
    ranks = {t: p / len(t) ** penalty for t, p in every_text(model, prompt, stops).items()}
    for n in (1, 2, 8):  # few are finished early, when longer ones may still come before them
        found = beam_search(
            model, prompt, beams=64, n=n, length_penalty=penalty, max_new_tokens=MOST,
            stop_ids=stops,
        )  # fmt: skip
        best = sorted(ranks, key=lambda text: -ranks[text])[:n]
        wanted = [ranks[text] for text in best]
        np.testing.assert_allclose([rank(t, penalty) for t in found], wanted, rtol=1e-4)
        assert {t.tokens for t in found} == {*best}
        assert all((t.finish_reason == "stop") == (t.tokens[-1] in stops) for t in found)


def test_several_stops_leave_a_beam_for_each():
    """All of the likeliest continuations may end; the next ones go on."""
    model, prompt, stops = tiny.model(*TOY), [3, 0, 2], (0, 1, 2)
    (text,) = beam_search(
        model, prompt, beams=1, max_new_tokens=MOST, stop_ids=stops, length_penalty=-9.0
    )
    assert text.tokens[0] in stops
    only = beam_search(
        model, prompt, beams=1, max_new_tokens=MOST, stop_ids=stops, min_new_tokens=MOST
    )
    assert only[0].tokens == (3,) * MOST


def test_one_beam_is_greedy():
    """Without a penalty, under which a text that has not ended may still come before it."""
    model, prompts = tiny.model(), [tiny.tokens(n, n) for n in (1, 9, 20)]
    want = generate(model, prompts, max_new_tokens=10, temperature=0.0, stop_ids=[3, 7])
    got = beam_search(
        model, prompts, beams=1, max_new_tokens=10, stop_ids=[3, 7], length_penalty=0.0
    )
    for one, other in zip(got, want, strict=True):
        assert (one.prompt, one.tokens, one.finish_reason) == (
            other.prompt, other.tokens, other.finish_reason
        )  # fmt: skip
        np.testing.assert_allclose(one.raw_logprobs, other.raw_logprobs, atol=1e-4)


@pytest.mark.parametrize("kind", ["repetition", "ring"])
def test_scores_are_those_of_the_model(kind):
    """Histories and rings go along with the beams that they are of."""
    positions = ["model.positions=streaming_llm", "model.positions.kept=12"]
    model = tiny.model(*(positions if kind == "ring" else []))
    prompt = tiny.tokens(15, 3)
    options = {"no_repeat_ngram": 1} if kind == "repetition" else {}
    found = beam_search(
        model, prompt, beams=4, n=4, max_new_tokens=12, engine={"chunk": 4}, **options
    )
    assert [rank(t, 1.0) for t in found] == sorted([rank(t, 1.0) for t in found], reverse=True)
    assert len({t.tokens for t in found}) == 4
    rows = [np.array([*prompt, *t.tokens[:-1]], np.int32) for t in found]
    for text, own in zip(found, tiny.logprobs(model, rows), strict=True):
        places = range(len(prompt) - 1, len(prompt) + 11)
        seen, wanted = [*prompt], []
        for at, token in zip(places, text.tokens, strict=True):
            left = [i for i in range(tiny.VOCAB) if kind == "ring" or i not in seen]
            wanted.append(own[at][token] - np.logaddexp.reduce(own[at][left]))
            seen.append(token)
        np.testing.assert_allclose(text.logprobs, wanted, atol=1e-4)
        assert kind == "ring" or len({*text.tokens, *prompt}) == len({*prompt}) + 12


@pytest.mark.parametrize(("penalty", "stops"), [(1.0, [3]), (0.6, [3, 7, 11, 20])])
def test_transformers_finds_the_same(penalty, stops, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers computes with torch")
    transformers = pytest.importorskip("transformers")
    model, prompt = tiny.model("data.length=64"), tiny.tokens(9, 4)
    save_folder(model, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    with torch.no_grad():
        want = theirs.generate(
            torch.from_numpy(prompt[None].astype(np.int64)),
            attention_mask=torch.ones(1, 9),
            num_beams=4,
            num_return_sequences=4,
            early_stopping="never",
            length_penalty=penalty,
            max_new_tokens=10,
            eos_token_id=stops,
            pad_token_id=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    found = beam_search(
        model, prompt, beams=4, n=4, max_new_tokens=10, stop_ids=stops, length_penalty=penalty
    )
    np.testing.assert_allclose(
        [rank(t, penalty) for t in found], want.sequences_scores.numpy(), atol=1e-4
    )
    for text, row in zip(found, want.sequences[:, 9:].tolist(), strict=True):
        assert row[: len(text.tokens)] == [*text.tokens]
        assert {*row[len(text.tokens) :]} <= {1}


REFUSED = {
    "n": ({"n": 5}, "n=5 texts of beams=4: give 1 <= n <= beams"),
    "no text": ({"n": 0}, "n=0 texts"),
    "draws": ({"temperature": 0.5}, "temperature=0.5 is for draws, beam search has none"),
    "stop ids": ({"stop_ids": [99]}, "stop_ids=99 must be below the 40"),
    "too long": ({"max_new_tokens": 31}, "33 tokens of prompt and generation exceed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_searches_that_cannot_be(name):
    options, says = REFUSED[name]
    with pytest.raises(UserError, match=says):
        beam_search(tiny.model(), [1, 2], **{"max_new_tokens": 2, **options})


def test_a_search_that_no_table_has_places_for():
    model = tiny.model("model.positions=learned", "model.positions.length=64")
    with pytest.raises(UserError, match="does not fit the learned table"):
        beam_search(model, [1, 2], max_new_tokens=63, full="config")


def test_no_prompts():
    assert beam_search(tiny.model(), []) == []
    assert Engine(tiny.model()).rows == 8
