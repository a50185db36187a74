"""The experiment on context extension: its methods are valid, and a tiny run is whole."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from lcm import config, models, positions, reproduce


@pytest.fixture(scope="module")
def experiment():
    file = reproduce.FOLDER / "context_extension" / "experiment.py"
    spec = importlib.util.spec_from_file_location("context_extension", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_is_a_model_at_every_length_with_the_same_parameters(experiment):
    base = experiment._base("text", experiment.CPU)
    shapes = jax.eval_shape(lambda: models.init(base, jax.random.key(0)))
    for name, overrides in experiment.METHODS.items():
        for s in (1, *experiment.FACTORS):
            cfg = experiment._overridden(base, overrides, s)
            config.check_keys(cfg)
            models.check_params(cfg, shapes)
            encoding = models.spec(cfg).positions
            assert (encoding == positions.RoPE()) == (name in ("rope", "window"))
    assert set(experiment.REFERENCE) <= set(experiment.METHODS)


def test_every_tuning_has_as_many_tokens_a_step(experiment, tmp_path):
    for kind in ("text", "lookup"):
        base = experiment._base(kind, experiment.CPU)
        for name in experiment.TUNINGS:
            cfg = experiment._tuning(kind, base, experiment.CPU, name, tmp_path)
            assert cfg.train.batch * cfg.data.length == 1024 and cfg.train.steps == 300
            placement = positions.make_placement(cfg.train.placement)
            placement.check(cfg.data.length)
            whole = kind == "lookup" or name not in ("PoSE, at L", "CREAM, at L")
            assert placement.span == (1 if whole else {"P": 5, "C": 4}[name[0]])


@pytest.mark.slow  # two minutes; last run 2026-11-25
def test_a_tiny_run_is_whole_and_goes_on(experiment, tmp_path, capsys):
    reproduce.run("context_extension", tmp_path, "tiny")
    result = json.loads((tmp_path / "results.json").read_text())
    assert set(result["untuned"]) == set(experiment.TINY.methods)
    assert set(result["tuned"]) == set(experiment.TINY.tunings)
    for scores in [*result["untuned"].values(), *result["tuned"].values()]:
        assert set(scores) == {"1", "2", "4", "8"}
        for s, score in scores.items():
            assert len(score["by_position"]) == 64 * int(s)
            assert np.all(np.isfinite(score["by_position"]))
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    (tmp_path / "untuned" / "yarn.json").unlink()
    reproduce.run("context_extension", tmp_path, "tiny")
    assert json.loads((tmp_path / "results.json").read_text()) == result
    assert "tuned: CLEX, at L" in capsys.readouterr().out
