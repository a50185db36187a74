"""The experiments on transducers and retrievers at a tiny scale: whole, and nothing twice."""

import json

import pytest

from lcm import reproduce
from lcm.models import decoder, transducer


def _fail(*arguments, **keywords):
    raise AssertionError("something is trained")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transducer", "retriever"])
def test_whole_and_nothing_twice(name, tmp_path, monkeypatch):
    reproduce.run(name, tmp_path, "tiny")
    result = (tmp_path / "results.json").read_text()
    page = (tmp_path / "report.html").read_text()
    found = json.loads(result)
    if name == "transducer":
        assert set(found) == {"sum", "tanh"} and "arXiv:1211.3711" in page
        for one in found.values():
            assert len(one["greedy"]) == len(one["beam"]) == 2
            assert all(rate >= 0 for rate in one["greedy"].values())
    else:
        assert "arXiv:2408.08066" in page and found["test"] > 0
        assert len(found["rows"]) == 4  # BM25 of two lengths, a model untrained and trained
        for row in found["rows"].values():
            recalls = list(row.values())[:-1]
            assert recalls == sorted(recalls) and recalls[-1] <= 1
    monkeypatch.setattr(transducer, "init", _fail)
    monkeypatch.setattr(decoder, "init", _fail)
    reproduce.run(name, tmp_path, "tiny")
    assert (tmp_path / "results.json").read_text() == result
