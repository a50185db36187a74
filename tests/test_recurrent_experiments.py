"""The experiments on recurrent models at a tiny scale: whole, and nothing twice."""

import json

import pytest

from lcm import reproduce
from lcm.models import decoder


def _fail(*arguments, **keywords):
    raise AssertionError("something is trained")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recurrent_length", "mqar", "state_collapse", "hybrid_recall"])
def test_whole_and_nothing_twice(name, tmp_path, monkeypatch):
    reproduce.run(name, tmp_path, "tiny")
    result = (tmp_path / "results.json").read_text()
    page = (tmp_path / "report.html").read_text()
    found = json.loads(result)
    if name == "recurrent_length":
        assert {"from nothing", "zero", "passed", "window T", "norms held"} <= set(found["mamba2"])
        assert "Measured before" in page
        found = found["mamba2"]
    for one in found.values():
        values = one["accuracy"]
        assert all(0 <= x <= 1 for x in (values.values() if name == "mqar" else values))
    monkeypatch.setattr(decoder, "init", _fail)
    reproduce.run(name, tmp_path, "tiny")
    assert (tmp_path / "results.json").read_text() == result
