"""Results on disk, and two runs compared document by document."""

import os

import numpy as np
import pytest

from lcm.evaluation import results
from lcm.evaluation.documents import EvaluationError
from lcm.evaluation.perplexity import evaluate

from . import scorers
from .scorers import random_document


def result(score, sizes=(128, 130, 200, 260), **settings):
    documents = [random_document(f"d{i}", size, seed=i) for i, size in enumerate(sizes)]
    settings = {"train_length": 16, "batch_tokens": 256, "replicates": 200} | settings
    return evaluate(score, documents, **settings)


def test_round_trip_makes_folders_and_leaves_nothing_else(tmp_path):
    saved = result(scorers.local(3))
    path = results.save(saved, tmp_path / "eval" / "length.json")
    loaded = results.load(path)
    assert loaded["lengths"] == saved["lengths"]
    assert loaded["settings"]["multiples"] == [1, 2, 4, 8]
    assert os.listdir(path.parent) == ["length.json"]


def test_a_failed_write_keeps_the_old_result(tmp_path, monkeypatch):
    path = results.save(result(scorers.uniform), tmp_path / "length.json")
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EvaluationError, match=r"length\.json: No space left"):
        results.save(result(scorers.local(2)), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["length.json"]


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="cannot write"):
        results.save({}, tmp_path / "file" / "x.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema"', "not JSON"),
        ("[1]", "not an evaluation"),
        ('{"kind": "retrieval"}', "not an evaluation"),
        ('{"kind": "loss by length", "schema": 99}', "schema 99"),
    ],
)
def test_files_that_are_no_results(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        results.load(tmp_path / "x.json")
    with pytest.raises(EvaluationError, match="No such file"):
        results.load(tmp_path / "absent.json")


def test_runs_are_compared_document_by_document():
    cheap = result(scorers.by_position(lambda p: 1.0 + 0 * p))
    dear = result(scorers.by_position(lambda p: np.where(p < 32, 1.0, 1.5)))
    differences = results.loss_differences(dear, cheap)
    assert {length: d.value for length, d in differences.items()} == pytest.approx(
        {16: 0, 32: 0, 64: 0.25, 128: 0.375}
    )
    assert all(d.low <= d.value <= d.high for d in differences.values())
    with pytest.raises(EvaluationError, match="same documents"):
        results.loss_differences(dear, result(scorers.uniform, sizes=(128, 140)))
