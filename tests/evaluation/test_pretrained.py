"""`lcm evaluate --model` of a tiny model: what is kept is not computed again, and is its own."""

import json

import numpy as np
import pytest

from lcm import cli, pretrained
from lcm.errors import UserError
from lcm.evaluation import evaluate_pretrained, heldout, memory, model, passkey, perplexity
from lcm.evaluation.windows import cut

from . import harness_model

TRAINED = harness_model.TRAINED
SMALL = ["eval.tokens=1536", "eval.batch_tokens=512"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return harness_model.write(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture
def scored(monkeypatch):
    """Shapes that went through the model."""
    shapes = []
    plain = model._losses

    def counted(spec, params, batch):
        shapes.append(batch.tokens_BL.shape)
        return plain(spec, params, batch)

    monkeypatch.setattr(model, "_losses", counted)
    return shapes


@pytest.mark.slow
def test_a_further_length_is_all_that_is_computed(folder, tmp_path, scored, capsys):
    evaluate = lambda *lengths, also=(): json.loads(  # noqa: E731
        evaluate_pretrained(str(folder), [*SMALL, *also], lengths=lengths, workdir=tmp_path)[
            1
        ].read_text()
    )
    first = evaluate(48, TRAINED)
    assert {length for _, length in scored} == {48, TRAINED}
    scored.clear()
    second = evaluate(48, TRAINED, 192)
    assert {length for _, length in scored} == {192}
    assert second["lengths"][:2] == first["lengths"] and second["context"] is None
    assert second["documents"] == first["documents"]
    scored.clear()
    assert evaluate(48, TRAINED, 192) == second and not scored
    evaluate(48, also=["model.positions=yarn", "model.positions.factor=2"])
    assert {length for _, length in scored} == {48}
    # the mean by another way, from all logits
    plain = pretrained.load(folder)
    documents = [d for d in heldout(plain.cfg, plain.tokenizer) if d.name in _names(second)]
    loss = _by_hand(plain, documents, _sizes(second), 192)
    assert second["lengths"][2]["loss"]["value"] == pytest.approx(loss, rel=1e-5)
    assert [entry["length"] for entry in second["perplexity"]] == [48, TRAINED, 192]


def _names(result):
    return result["documents"]["long"]["names"]


def _sizes(result):
    return dict(zip(_names(result), result["documents"]["long"]["tokens"], strict=True))


def _by_hand(plain, documents, sizes, length):
    losses = []
    for document in documents:
        for start in range(0, sizes[document.name], length):
            end = min(start + length, sizes[document.name])
            tokens, targets = (x[None, start:end] for x in (document.tokens_N, document.targets_N))
            logits = np.asarray(_logits(plain, tokens), np.float64)[0]
            log_z = np.log(np.exp(logits).sum(-1))
            losses += (log_z - logits[np.arange(end - start), targets[0]]).tolist()
    return np.mean(losses)


def _logits(plain, tokens):
    from lcm import models

    return models.apply(plain.cfg, plain.params, tokens)[0]


def test_what_is_kept_is_of_one_model_and_one_job(folder, tmp_path):
    plain = pretrained.load(folder)
    documents = heldout(plain.cfg, plain.tokenizer)[:3]
    sizes = [len(document.tokens_N) for document in documents]
    job = perplexity.Job(documents, cut(sizes, 32, 32))
    losses = [np.random.default_rng(0).random(n).astype(np.float32) for n in sizes]
    losses[1][:] = np.nan
    kept = memory.Losses(tmp_path, memory.identity(plain))
    assert kept.find("lengths", 32, job) is None
    kept.keep("lengths", 32, job, losses)
    for mine, other in zip(kept.find("lengths", 32, job), losses, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert kept.find("lengths", 16, perplexity.Job(documents, cut(sizes, 16, 16))) is None
    assert kept.find("lengths", 32, perplexity.Job(documents[:2], cut(sizes[:2], 32, 32))) is None
    other = plain._replace(params={**plain.params, "final_norm": {"scale": np.zeros(32)}})
    assert memory.Losses(tmp_path, memory.identity(other)).find("lengths", 32, job) is None
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(file.read_bytes()[:50])
    assert kept.find("lengths", 32, job) is None  # cut off


def test_the_command(folder, tmp_path, capsys):
    run = lambda *words: (cli.main(["evaluate", *map(str, words)]), capsys.readouterr())  # noqa: E731
    at = ["--model", folder, "--workdir", tmp_path / "run"]
    small = [f"--config.{assignment}" for assignment in SMALL]
    code, said = run(*at, "--lengths", "48,192", *small)
    assert code == 0 and "192" in said.out and "Perplexity" in said.out
    assert (tmp_path / "run" / "eval" / "step-0.json").exists()
    code, said = run(*at, "--passkey", "--lengths", "260")
    assert code == 0 and "Keys found" in said.out
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    (tmp_path / "trained" / "checkpoints").mkdir(parents=True)
    for words, message in (
        ([], "either the WORKDIRs of trained runs or one --model"),
        ([*at, tmp_path], "either the WORKDIRs of trained runs or one --model"),
        ([tmp_path, "--passkey"], "--passkey goes with --model"),
        ([*at, "--lengths", "0,48"], "--lengths 0 must be 1 or more"),
        ([*at, "--passkey", "--lengths", "48"], "has no room for filler"),
        ([*at[:2], "--workdir", tmp_path / "trained"], "is the workdir of a training run"),
    ):
        code, said = run(*words)
        assert code == 2 and message in said.err, said.err


class TestPasskey:
    def test_prompts(self, folder):
        tokenizer = pretrained.load(folder).tokenizer
        for depth in (0.0, 0.3, 1.0):
            trial = passkey.Trial(400, depth, 0)
            text = passkey.prompt(trial, tokenizer)
            assert text.count(str(trial.key)) == 2 and 10_000 <= trial.key < 100_000
            size = len(passkey._encoded(text, tokenizer))
            longest = max(len(tokenizer.encode(" " + each)) for each in passkey.FILLER)
            assert 400 - passkey.NEW_TOKENS - longest - 2 < size <= 400 - passkey.NEW_TOKENS
            before, after = text.split("\n")[1], text.split("\n")[3]
            share = len(before.split(".")) / len((before + after).split("."))
            assert share == pytest.approx(depth, abs=0.15)
        assert sum(map(len, passkey.FILLER)) + 4 == 89  # characters of the block in the paper
        keys = {passkey.Trial(400, d, s).key for d in (0.1, 0.5) for s in range(3)}
        assert len(keys) == 6 and passkey.Trial(400, 0.1, 0).key == passkey.Trial(400, 0.1, 0).key

    def test_the_first_number_counts(self):
        assert passkey.found(" 12345.", 12345) and passkey.found("is 012345", 12345)
        assert not passkey.found(" 1, 12345", 12345) and not passkey.found("no number", 12345)

    @pytest.mark.quick("rope", "dynamic_ntk")
    @pytest.mark.parametrize("positions", ["rope", "lm_infinite", "dynamic_ntk"])
    def test_one_reading_gives_what_two_would(self, folder, positions, tmp_path):
        from lcm.decoding.engine import Engine
        from lcm.decoding.texts import generate
        from lcm.evaluation.likelihood import Ask, answers

        given = {"lm_infinite": ["model.positions.window=40"], "dynamic_ntk": []}
        change = [f"model.positions={positions}", *given.get(positions, [])]
        plain = pretrained.changed(pretrained.load(folder), change)
        trial = passkey.Trial(300, 0.5, 0)
        got = passkey.answer(Engine(plain, rows=1), trial)
        text = passkey.prompt(trial, plain.tokenizer)
        greedy = {"temperature": 0.0, "max_new_tokens": passkey.NEW_TOKENS, "full": "config"}
        (written,) = generate(plain, text, **greedy)
        assert got["written"] == written.text
        ids = passkey._encoded(f"{text} {trial.key}", plain.tokenizer)
        count = len(ids) - got["tokens"]
        ((_, likely),) = answers(plain, [Ask(ids, count)])
        # A chunk reads what is before it at the length so far, where encodings go by that.
        if positions != "dynamic_ntk":
            assert got["logprob"] == pytest.approx(likely.total / count, rel=1e-4)

    def test_answers_are_kept(self, folder, tmp_path, monkeypatch):
        plain, file = pretrained.load(folder), tmp_path / "passkey.json"
        some = passkey.retrieve(plain, [260], file=file, depths=(0.1, 0.9))
        asked = []
        monkeypatch.setattr(passkey, "answer", lambda e, t, a: asked.append(t) or some["trials"][0])
        more = passkey.retrieve(plain, [260], file=file, depths=(0.1, 0.5, 0.9))
        assert [trial.depth for trial in asked] == [0.5] and len(more["trials"]) == 3
        asked.clear()
        other = pretrained.changed(plain, ["model.positions=nope"])
        passkey.retrieve(other, [260], file=file, depths=(0.1,))
        assert len(asked) == 1  # another model's answers are not its own

    def test_lengths_that_hold_no_question(self, folder):
        with pytest.raises(UserError, match=r"has no room for filler: give lengths of \d+ or more"):
            passkey.prompt(passkey.Trial(20, 0.5, 0), pretrained.load(folder).tokenizer)
