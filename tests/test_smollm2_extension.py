"""The experiment on SmolLM2: its methods are models, and a tiny run is whole and goes on."""

import importlib.util
import json
import math

import numpy as np
import pytest

from lcm import models, positions, reproduce


@pytest.fixture(scope="module")
def experiment():
    file = reproduce.FOLDER / "smollm2_extension" / "experiment.py"
    spec = importlib.util.spec_from_file_location("smollm2_extension", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_methods_change_what_they_say(experiment):
    plain = experiment.random_model()
    made = {}
    for name in experiment.METHODS:
        model = experiment.at_length(plain, name, 2048)
        made[name] = models.spec(model.cfg).positions
        assert made[name].__class__ is not positions.RoPE or name == "plain"
        models.check_params(model.cfg, plain.params)
    assert made["yarn"].factor == 2 and made["dynamic ntk"].length == 2048
    assert (made["self-extend"].group, made["self-extend"].window) == (4, 256)
    assert made["dual chunk"].chunk + made["dual chunk"].local <= 1024
    assert made["lm-infinite"].window == 1024


def test_those_that_are_the_plain_model_within_its_length(experiment):
    plain = experiment.random_model()
    assert all(experiment.at_length(plain, name, 1024) is plain for name in experiment.WITHIN)
    tokens = np.random.default_rng(0).integers(0, 256, (1, 1024), np.int32)
    wanted, _ = models.apply(plain.cfg, plain.params, tokens)
    for name in experiment.METHODS:
        model = experiment.at_length(plain, name, 2048)
        got, _ = models.apply(model.cfg, plain.params, tokens)
        same = np.allclose(got, wanted, atol=1e-5)
        # NTK is that of the length it is ready for, which `length` fixes.
        assert same == (name in ("plain", "lm-infinite"))


@pytest.mark.slow  # a minute; last run 2026-11-25
def test_a_tiny_run_is_whole_and_goes_on(experiment, tmp_path, capsys):
    reproduce.run("smollm2_extension", tmp_path, "tiny")
    result = json.loads((tmp_path / "results.json").read_text())
    assert set(result["methods"]) == set(experiment.TINY.methods)
    for found in result["methods"].values():
        assert len(found["by_position"]) == 2048
        for length in ("1024", "2048"):
            assert math.isfinite(found[length]["loss"])
            assert [trial["depth"] for trial in found[length]["passkey"]] == [0.5]
    plain, dynamic, window = (
        result["methods"][name] for name in ("plain", "dynamic ntk", "lm-infinite")
    )
    for other in (dynamic, window):  # the very model, up to the trained length
        assert other["1024"] == plain["1024"]
        assert other["2048"]["loss"] != pytest.approx(plain["2048"]["loss"], rel=1e-5)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "Key found" in page
    assert "Perplexity (nats) of the last 64 tokens" in capsys.readouterr().out
    for file in (tmp_path / "kept").glob("passkey-2048-*.json"):
        if "dynamic_ntk" in file.read_text():
            file.unlink()
    reproduce.run("smollm2_extension", tmp_path, "tiny")
    assert json.loads((tmp_path / "results.json").read_text()) == result
    said = capsys.readouterr().err
    assert "dynamic ntk at 2,048" in said and "loss:" not in said and "plain" not in said
