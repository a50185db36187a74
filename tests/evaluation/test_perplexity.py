"""The whole evaluation, on scorers whose answers are known."""

import json
import math

import numpy as np
import pytest

from lcm.errors import ConfigError
from lcm.evaluation.documents import EvaluationError, from_text_tokens
from lcm.evaluation.perplexity import evaluate

from . import scorers
from .scorers import VOCABULARY, random_document

SIZES = (300, 64, 190, 128, 500, 40, 9)


def documents():
    return [random_document(f"d{i}", size, seed=i) for i, size in enumerate(SIZES)]


def run(score, docs=None, **settings):
    settings = {"train_length": 16, "batch_tokens": 256, "replicates": 500} | settings
    return evaluate(score, documents() if docs is None else docs, **settings)


def values(result, key):
    return [point[key]["value"] for point in result["lengths"]]


def test_uniform_model():
    result = run(scorers.uniform)
    for entry in [*result["lengths"], *result["perplexity"]]:
        assert entry["perplexity"] == pytest.approx(
            dict.fromkeys(("value", "low", "high"), VOCABULARY), rel=1e-5
        )
    # one byte a token, but for EOS, which is a token and no byte
    tokens, text_bytes = sum(SIZES), sum(SIZES) - len(SIZES)
    for entry in result["perplexity"]:
        assert entry["tokens"] == tokens
        assert entry["bits_per_byte"]["value"] == pytest.approx(
            math.log2(VOCABULARY) * tokens / text_bytes, rel=1e-6
        )
    assert result["effective_length"] | {"relative_loss": None} == {
        "value": 128, "low": 128, "high": 128, "threshold": 1.05, "reference": 16,
        "lengths": [16, 32, 64, 128], "relative_loss": None, "longest_tested": True,
    }  # fmt: skip


def test_bigram_model_is_flat_and_blind_to_protocols():
    table = scorers.bigram_table()
    result = run(scorers.bigram(table))
    long = [d for d in documents() if len(d.tokens_N) >= 128]
    expected = np.concatenate(
        [table[d.tokens_N, d.targets_N][: len(d.tokens_N) // 128 * 128].astype(float) for d in long]
    )
    assert [len(d.tokens_N) for d in long] == [300, 190, 128, 500]
    assert values(result, "loss") == pytest.approx([expected.mean()] * 4)
    assert result["effective_length"]["value"] == 128
    non_overlapping, sliding = result["perplexity"]
    assert (non_overlapping["protocol"], sliding["protocol"]) == ("non-overlapping", "sliding")
    assert sliding["loss"] == non_overlapping["loss"]
    for point in result["lengths"][1:]:
        assert point["beyond"]["excess"] == pytest.approx({"value": 0, "low": 0, "high": 0})
    contexts = [point["loss"]["value"] for point in result["context"]["points"]]
    assert contexts == pytest.approx([contexts[0]] * 5)


def test_positions_add_up_to_the_mean():
    result = run(scorers.local(5))
    for point in result["lengths"]:
        assert point["tokens"] == 256 + 128 + 128 + 384
        for curve, mean in ((point["by_position"], "mean"), (point["curve"], "value")):
            assert sum(curve["count"]) == point["tokens"]
            total = np.dot(curve["count"], curve[mean]) / point["tokens"]
            assert total == pytest.approx(point["loss"]["value"], rel=1e-12)
        assert point["by_position"]["edges"] == list(range(point["length"] + 1))
        assert 16 in point["curve"]["edges"]


def test_failure_past_the_training_length_shows():
    result = run(scorers.by_position(lambda p: np.where(p < 16, 1.0, 3.0)))
    assert values(result, "loss") == pytest.approx([1.0, 2.0, 2.5, 2.75])
    assert result["lengths"][0]["beyond"] is None
    for point in result["lengths"][1:]:
        assert point["beyond"]["loss"]["value"] == 3
        assert point["beyond"]["within"]["value"] == 1
        assert point["beyond"]["excess"]["value"] == 2
        assert point["beyond"]["tokens"] == point["tokens"] * (1 - 16 / point["length"])
    assert result["effective_length"]["value"] == 16
    assert not result["effective_length"]["longest_tested"]
    # windows of 8 to 128, of which the last 4 tokens are scored
    points = result["context"]["points"]
    assert [p["context"] for p in points] == [4, 12, 28, 60, 124]
    assert [p["loss"]["value"] for p in points] == [1, 1, 3, 3, 3]
    assert {p["tokens"] for p in points} == {4 * 7}


def test_a_copier_gains_where_the_text_repeats():
    """Text of period 32: a window of 16 never shows the copy, longer windows from position 31."""
    texts = [np.tile(np.random.default_rng(i).integers(2, 12, 32), 8) for i in range(6)]
    docs = [
        from_text_tokens(f"t{i}", text, bos=0, eos=1, text_bytes=256)
        for i, text in enumerate(texts)
    ]
    result = run(scorers.copier(lag=32), docs)
    by_position = result["lengths"][2]["by_position"]["mean"]
    guess = math.log(VOCABULARY)
    assert by_position[:31] == pytest.approx([guess] * 31)
    # the window at the start of a document holds BOS in the place of the copied token
    assert by_position[32:] == pytest.approx([0.1] * 32)
    assert values(result, "loss")[:1] == pytest.approx([guess])
    assert np.all(np.diff(values(result, "loss")) <= 0)
    assert result["lengths"][3]["beyond"]["excess"]["high"] < -1
    contexts = [point["loss"]["value"] for point in result["context"]["points"]]
    # of the 4 tokens scored after 28, the last alone stands at position 31
    assert contexts == pytest.approx([guess, guess, (3 * guess + 0.1) / 4, 0.1, 0.1])
    assert result["perplexity"][1]["loss"]["value"] == pytest.approx(guess)


def test_sliding_is_better_when_early_positions_are_hard():
    result = run(scorers.by_position(lambda p: 1 / (1 + p)), stride=4)
    non_overlapping, sliding = result["perplexity"]
    assert (sliding["length"], sliding["stride"]) == (16, 4)
    assert sliding["loss"]["value"] < 0.6 * non_overlapping["loss"]["value"]


def test_intervals_pair_lengths_over_documents():
    """Documents far apart in difficulty, and 3% dearer at twice the length: still told apart."""

    def score(batch):
        difficulty = batch.targets_BL.max(axis=1, keepdims=True)
        return difficulty * np.where(batch.context.positions_BL < 16, 1.0, 1.06)

    docs = [
        from_text_tokens(f"c{i}", np.full(31, 2 + i), bos=2 + i, eos=2 + i, text_bytes=31)
        for i in range(10)
    ]
    result = run(score, docs, multiples=(1, 2), threshold=1.02)
    short, long = (point["loss"] for point in result["lengths"])
    assert short["low"] < long["value"] < short["high"]
    assert result["effective_length"]["value"] == result["effective_length"]["high"] == 16
    assert result["effective_length"]["relative_loss"][1]["low"] > 1.029


def test_the_result_is_json_repeatable_and_says_what_was_done():
    result = run(scorers.local(3), about={"run": "x", "step": 3})
    assert json.loads(json.dumps(result, allow_nan=False)) == json.loads(
        json.dumps(run(scorers.local(3), about={"run": "x", "step": 3}))
    )
    assert result["schema"] == 1
    assert result["about"] == {"run": "x", "step": 3}
    assert result["settings"]["stride"] == 8
    assert result["documents"]["given"] == 7
    assert result["documents"]["long enough"] == 4
    assert result["documents"]["long"]["names"] == ["d0", "d2", "d3", "d4"]
    assert result["documents"]["all"]["tokens"] == list(SIZES)


def test_one_document_gives_values_without_intervals():
    result = run(scorers.local(3), [random_document("only", 200)])
    for entry in [result["lengths"][0]["loss"], result["perplexity"][0]["bits_per_byte"]]:
        assert entry["value"] and entry["low"] is None and entry["high"] is None
    assert result["effective_length"]["value"] and result["effective_length"]["low"] is None
    json.dumps(result, allow_nan=False)


def test_the_budget_binds_and_the_documents_do_not_depend_on_the_model():
    result = run(scorers.uniform, max_tokens=300)
    assert sum(result["documents"]["long"]["tokens"]) == 256
    assert sum(result["documents"]["all"]["tokens"]) <= 300
    assert result["documents"] == run(scorers.local(2), max_tokens=300)["documents"]
    assert result["documents"] != run(scorers.uniform, max_tokens=300, seed=5)["documents"]


def test_one_shape_per_length_and_progress_to_the_end():
    shapes, told = set(), []

    def score(batch):
        shapes.add(batch.tokens_BL.shape)
        return scorers.uniform(batch)

    run(score, progress=lambda done, total: told.append((done, total)))
    assert shapes == {(256 // length, length) for length in (8, 16, 32, 64, 128)}
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(set(done)) and set(totals) == {done[-1]}


def test_overflowing_perplexity_stays_json():
    result = run(scorers.by_position(lambda p: np.full(p.shape, 800.0)))
    assert result["lengths"][0]["loss"]["value"] == 800
    assert result["lengths"][0]["perplexity"]["value"] is None
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"stride": 17}, ConfigError, "stride 17 .* 16"),
        ({"stride": 0}, ConfigError, "stride 0"),
        ({"multiples": (1, 64)}, EvaluationError, "reaches 1024 tokens.*'d4', has 500"),
        ({"multiples": (1, 0.3)}, ConfigError, "multiple 0.3 .* 4.8 tokens"),
        ({"multiples": ()}, ConfigError, "multiple 0"),
        ({"multiples": (0,)}, ConfigError, "multiple 0"),
        ({"max_tokens": 100}, ConfigError, "max_tokens 100 .* 128"),
        ({"threshold": 1.0}, ConfigError, "threshold 1.0"),
        ({"train_length": 0}, ConfigError, "training length 0"),
    ],
)
def test_settings_that_cannot_work(settings, error, message):
    with pytest.raises(error, match=message):
        run(lambda batch: pytest.fail("scored before the settings were checked"), **settings)


def test_no_documents_and_broken_documents():
    with pytest.raises(EvaluationError, match="no held-out documents"):
        run(scorers.uniform, [])
    broken = random_document("b", 200)._replace(targets_N=np.zeros(3, np.int32))
    with pytest.raises(EvaluationError, match="'b' has 200 tokens and 3 targets"):
        run(scorers.uniform, [broken])
