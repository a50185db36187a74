"""`lcm analyse` on runs of no step: what it writes, what it leaves out, what it refuses."""

import json

import jax
import numpy as np
import pytest

from lcm import cli, evaluation, models
from lcm.errors import ConfigError
from lcm.evaluation import analysis, heads, parts, receptive_field
from lcm.evaluation.documents import EvaluationError, from_text_tokens

from .runs import LENGTH, write_run


@pytest.fixture(scope="module")
def rope(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "rope", "model.positions=rope")


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """T5 biases in two kinds of layers, the second with a window of 3."""
    return write_run(
        tmp_path_factory.mktemp("runs") / "biased",
        "model.positions=t5",
        "model.pattern=attention,local",
        "model.kinds.local.mixer=attention",
        "model.kinds.local.window=3",
    )


def test_rope_by_the_command_line_and_read_back(rope, capsys):
    assert cli.main(["analyse", str(rope), "--length", "32"]) == 0
    path = rope / "eval" / "attention-step-0.json"
    shown = capsys.readouterr().out
    assert shown.startswith(f"wrote {path}\n") and "Aligned temperatures" in shown
    json.loads(path.read_text(), parse_constant=pytest.fail)
    found = evaluation.load_analysis(path)
    assert found["settings"] == {"train_length": 16, "length": 32, "rows": 8, "seed": 0}
    for entry, length in zip(found["statistics"], (16, 32), strict=True):
        assert entry["length"] == length
        entropy = np.array(entry["entropy"])
        assert entropy.shape == (2, length) and np.all(entropy[:, 0] == 0)
        assert np.all(entropy <= np.log(np.arange(1, length + 1)) + 1e-4)
        assert np.all(np.array(entry["largest"]) >= 1 / np.arange(1, length + 1) - 1e-4)
    for entry, length in zip(found["positional_heads"], (16, 32), strict=True):
        assert entry["distance"] == length // 2 and np.shape(entry["score"]) == (2, 2)
        best = np.unravel_index(np.argmax(entry["score"]), (2, 2))
        assert entry["top"] == [list(best)]
    field = found["receptive_field"]
    assert "RoPE adds no bias" in field["theoretical"]["left_out"]
    assert 1 <= field["empirical"]["tokens"] <= 16
    assert field["empirical"]["eps"] == pytest.approx(0.01 * field["empirical"]["perplexity"])
    assert all(0 < t < 1 for t in found["aligned_temperature"].values())


def test_values_are_those_of_the_functions_on_the_same_rows(rope):
    model = evaluation.load(rope)
    found = evaluation.analyse_model(model, 32)
    documents = evaluation.heldout(model.cfg, model.tokenizer)
    rows = parts.text_rows(documents, 32, 8, 0)
    short = parts.cut(rows, 16)
    by_position = evaluation.statistic_by_position(
        model.cfg, model.params, short.tokens_BL, "largest"
    )
    np.testing.assert_allclose(found["statistics"][0]["largest"], by_position, atol=1e-5)
    scores = evaluation.positional_heads(model.cfg, model.params, rows.tokens_BL)
    np.testing.assert_allclose(found["positional_heads"][1]["score"], scores.score, atol=1e-5)
    perplexity = np.exp(np.mean(evaluation.scorer(model.cfg, model.params)(short)))
    empirical = found["receptive_field"]["empirical"]
    assert empirical["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert empirical["tokens"] == evaluation.empirical_receptive_field(
        model.cfg, model.params, short, empirical["eps"]
    )


def test_overrides_are_in_the_name_and_the_file_is_written_anew(rope, monkeypatch):
    def found(model, length, *, overrides, title):
        positions = model.cfg.model.positions.name
        return {"kind": "attention", "schema": 1, "positions": positions, "length": length}

    monkeypatch.setattr(analysis, "analyse_model", found)
    plain = evaluation.analyse_run(rope, [], 20)
    plain.write_text("{")
    assert evaluation.analyse_run(rope, [], 24) == plain
    assert json.loads(plain.read_text())["length"] == 24
    other = evaluation.analyse_run(rope, ["model.positions=linear", "eval.tokens=9"], 20)
    assert other.name == "attention-step-0-model.positions=linear.json"
    assert json.loads(other.read_text())["positions"] == "linear"
    plain.unlink(), other.unlink()


@pytest.mark.slow
def test_biases_have_fields_that_a_window_bounds_and_infinite_ones_come_back(biased):
    path = evaluation.analyse_run(biased, [], LENGTH)
    raw = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert raw["receptive_field"]["theoretical"]["by_head"][0] == ["inf", "inf"]
    found = evaluation.load_analysis(path)
    field = found["receptive_field"]["theoretical"]["by_head"]
    assert field == [[np.inf, np.inf], [3, 3]]
    assert "T5 does not rotate" in found["positional_heads"]["left_out"]
    assert len(found["statistics"]) == 1
    assert "the length is the trained one" in found["aligned_temperature"]["left_out"]
    alibi = analysis.changed(evaluation.load(biased), ["model.positions=alibi"])
    field = analysis._theoretical(alibi.cfg, alibi.params)["by_head"]
    np.testing.assert_array_equal(field[0], np.ceil(np.log(100) * np.array([2**4, 2**8])))


def test_what_an_encoding_does_not_have_is_left_out_with_the_reason(rope):
    cope = analysis.changed(evaluation.load(rope), ["model.positions=cope"])
    found = evaluation.analyse_model(cope, 32)
    assert "CoPE reads scores or chooses keys" in found["statistics"]["left_out"]
    assert "CoPE does not rotate" in found["positional_heads"]["left_out"]
    assert "CoPE reads scores" in found["aligned_temperature"]["left_out"]
    assert "CoPE reads scores" in found["receptive_field"]["theoretical"]["left_out"]
    assert 1 <= found["receptive_field"]["empirical"]["tokens"] <= LENGTH


@pytest.mark.parametrize(
    "overrides", [["model.positions=aligned+rope"], ["model.score_cap=5.0"]], ids=["aligned", "cap"]
)
def test_what_changes_scores_without_adding_is_no_bias(overrides, rope):
    model = analysis.changed(evaluation.load(rope), overrides)
    with pytest.raises(ConfigError, match="RoPE adds no bias"):
        analysis._theoretical(model.cfg, model.params)


def test_heads_that_see_nothing_far_have_no_score(rope):
    cfg = evaluation.load(rope).cfg
    model = analysis.changed(evaluation.load(rope), ["model.window=4"])
    rows = parts.text_rows(evaluation.heldout(cfg, model.tokenizer), 32, 2, 0)
    found = analysis._heads(model.cfg, model.params, 32, rows)
    assert found["score"] == found["allocation"] == [[None, None]] * 2 and found["top"] == []
    with pytest.raises(ConfigError, match=rf"8 tokens have no key 4 back past .* {heads.SINKS}:"):
        analysis._heads(cfg, model.params, 8, rows)


def test_rows_are_first_windows_of_documents_then_second_ones():
    documents = [
        from_text_tokens(f"{n}", np.arange(size) + 100 * n, bos=256, eos=257, text_bytes=size)
        for n, size in enumerate((9, 25, 3))
    ]
    rows = parts.text_rows(documents, 8, 9, 0)
    first = sorted(row[1] for row in rows.tokens_BL.tolist()[:2])
    assert first == [0, 100] and rows.tokens_BL[2:, 0].tolist() == [107, 115]
    np.testing.assert_array_equal(rows.tokens_BL[:, 1:], rows.targets_BL[:, :-1])
    pieces = parts.cut(rows, 3)
    assert pieces.tokens_BL.shape == (8, 3)
    assert pieces.context.positions_BL.tolist() == [[0, 1, 2]] * 8
    np.testing.assert_array_equal(pieces.tokens_BL[:2].ravel(), rows.tokens_BL[0, :6])
    with pytest.raises(EvaluationError, match="--length=30 tokens: the longest, '1', has 26"):
        parts.text_rows(documents, 30, 9, 0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--length=8"], ["--length=8 is shorter than the trained length 16", "or leave it out"]),
        (["--length=-1"], ["--length=-1 is shorter"]),
        (["--length=long"], ["--length", "invalid int"]),
        (["--length=50000"], ["--length=50000 has 5,000,000,000 scores", "--length=11585 or less"]),
        (["--length=10000"], ["no held-out document reaches --length=10000"]),
        (
            ["--length=32", "--config.model.positions=learned"],
            ["length 32 does not fit the learned table of 16 positions", "positions.length=32"],
        ),
        (["--config.model.widht=3"], ["did you mean config.model.width?"]),
        (["--config.model.width=64"], ["embedding/table is (320, 32)", "(320, 64)"]),
        (["--config.model.backend=tpu"], ["model.backend"]),
    ],
)
def test_what_cannot_be_analysed(words, says, rope, capsys):
    before = sorted(rope.rglob("*"))
    assert cli.main(["analyse", str(rope), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lcm: error: ") and err.count("\n") == 1
    assert all(text in err for text in says), err
    assert sorted(rope.rglob("*")) == before


def test_no_run_and_no_checkpoint(tmp_path, rope, capsys):
    assert cli.main(["analyse", str(tmp_path / "gone")]) == 2
    assert "gone does not exist: give a workdir" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_bytes((rope / "config.json").read_bytes())
    assert cli.main(["analyse", str(tmp_path / "empty")]) == 2
    assert "checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [("[]", "not an evaluation of attention"), ("{", "is not JSON"), (None, "damaged")],
)
def test_files_that_are_no_analyses(text, says, tmp_path):
    kind = {"kind": "attention", "schema": 1, "receptive_field": {"theoretical": 3}}
    (tmp_path / "a.json").write_text(json.dumps(kind) if text is None else text)
    with pytest.raises(EvaluationError, match=says):
        evaluation.load_analysis(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["alibi", "type_one", "type_two"])
@pytest.mark.parametrize("eps", [0.1, 0.01])
def test_keys_beyond_the_field_change_little(name, eps):
    """With constant q.k: |o - o truncated at TRF(eps)| <= 2 eps max|v| (arXiv:2307.10156)."""
    from lcm import positions

    weights = evaluation.bias_weights(positions.make({"name": name}), {}, 2)
    field = receptive_field.theoretical_receptive_field(weights, eps)
    rng = np.random.default_rng(0)
    for head, w in zip(weights, field.astype(int), strict=True):
        count = 4 * w
        turned = np.sign(np.arange(count)[:, None] - w + 0.5)
        for v in (rng.choice([-1.0, 1.0], (count, 64)), turned):
            whole, near = head[:count], head[:w]
            out, truncated = whole @ v / whole.sum(), near @ v[:w] / near.sum()
            assert abs(out - truncated).max() <= 2 * eps
            # and the bound is not idle: a tenth of the field breaks it where values turn there
        short = max(1, w // 10)
        v = np.sign(np.arange(count) - short + 0.5)
        assert abs(whole @ v / whole.sum() - v[0]) > 2 * eps


@pytest.mark.parametrize("name", ["nope", "alibi"])
def test_entropy_of_a_model_falls_with_the_factor_and_is_bounded(name, tiny):
    """At each query of the first layer, whose scores alone a factor multiplies; arXiv:2404.12224.

    Further layers read what the first ones wrote, so there the bound is all that must hold.
    """
    tokens = jax.random.randint(jax.random.key(1), (2, 48), 0, 256)
    bound, found = np.log(np.arange(1, 49)), []
    cfg = tiny(f"model.positions=aligned+{name}")
    params = jax.tree.map(lambda x: 3 * x, models.init(cfg, jax.random.key(0)))
    for factor in (1e-6, 0.25, 1.0, 1.5, 4.0):
        params["positions"]["model"]["first"]["temperature"] = 1 / np.float32(factor)
        entropy = evaluation.statistic_by_position(cfg, params, tokens, "entropy")
        assert entropy.shape == (2, 48) and np.all(entropy <= bound + 1e-5)
        found.append(entropy[0])
    np.testing.assert_allclose(found[0], bound, atol=1e-4)
    falls = np.diff(found, axis=0)
    assert np.all(falls <= 1e-5) and np.all(falls.mean(1) < -1e-2)
