"""The experiments on length generalisation at a tiny scale: whole, and nothing twice."""

import importlib.util
import json
import re

import pytest

from lcm import config, positions, reproduce, training
from lcm.data import tasks
from lcm.evaluation import generalization


@pytest.fixture(scope="module")
def nope(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nope")
    reproduce.run("nope_length_generalization", folder, "tiny")
    return folder


def module(name):
    """The module of an experiment."""
    file = reproduce.FOLDER / name / "experiment.py"
    spec = importlib.util.spec_from_file_location(name, file)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def _fail(*arguments, **keywords):
    raise AssertionError("something is trained")


@pytest.mark.slow
def test_results_have_every_curve_and_the_ranks(nope):
    result = json.loads((nope / "results.json").read_text())
    assert sum(result["mean_reciprocal_rank"].values()) == pytest.approx(1.5)  # 1 + 1/2
    assert len(result["tasks"]) == 2
    for spec, curves in result["tasks"].items():
        task = tasks.make(spec)
        assert set(curves) == {"nope", "rope", "head_scale+nope"}
        for points in curves.values():
            lengths = [point["length"] for point in points]
            assert lengths == [task.train[1], *tasks.span(task.test)]
            for point in points:
                assert 0 <= point["low"] <= point["value"] + 1e-9
                assert point["value"] <= point["high"] + 1e-9 and point["high"] <= 1
                mean = sum(point["by_seed"]) / len(point["by_seed"])
                assert point["value"] == pytest.approx(mean)


@pytest.mark.slow
def test_page_has_tables_pictures_and_published_figures(nope):
    page = (nope / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "arXiv:2305.19466" in page and "head_scale+nope" in page
    assert not re.search(r"<(script|link|iframe)\b", page)


@pytest.mark.slow
def test_what_is_finished_is_not_run_again(nope, monkeypatch):
    before = (nope / "results.json").read_text()
    monkeypatch.setattr(generalization, "points_over_seeds", _fail)
    reproduce.run("nope_length_generalization", nope, "tiny")
    assert (nope / "results.json").read_text() == before


@pytest.mark.parametrize("scale", ["CPU", pytest.param("PAPER", marks=pytest.mark.slow)])
def test_larger_scales_are_valid(scale):
    """Every task and encoding of them has a config whose rows fit and whose model can be built."""
    suite = module("nope_length_generalization")
    sizes = getattr(suite, scale)
    assert {"nope", "t5", "alibi", "rope", "sinusoidal", suite.SCALED} == set(sizes.encodings)
    for spec in sizes.tasks:
        task = tasks.make(spec)
        for name in ("nope", suite.SCALED):
            cfg = suite._config(sizes, spec, name)
            config.check_keys(cfg)
            batch = generalization.batches_of(cfg)(0, 0)
            assert batch.tokens_BL.max() < cfg.model.vocab
            new = tasks.make(cfg.data.source)
            assert new.train[1] == (task.test[1] if name == suite.SCALED else task.train[1])
            assert (cfg.train.only == "head_scale") == (name == suite.SCALED)
    for name in sizes.encodings:
        training.check(suite._config(sizes, sizes.tasks[0] + ",size=100", name))
    if scale == "CPU":
        lengths = [suite._config(sizes, spec, "nope").data.length for spec in sizes.tasks]
        assert set(lengths) == {32}  # one compilation for all


@pytest.mark.slow
def test_addition_runs_and_shows_each_seed(tmp_path, capsys):
    reproduce.run("addition_fire", tmp_path, "tiny")
    result = json.loads((tmp_path / "results.json").read_text())
    assert set(result["curves"]) == set(result["best_seed"]) == {"hints", "no hints"}
    for points in result["curves"].values():
        assert [point["length"] for point in points] == [2, 3, 4]
        assert all(len(point["by_seed"]) == 2 for point in points)
    used = json.loads((tmp_path / "hints" / "config.json").read_text())
    assert used["model"]["positions"]["name"] == "fire"
    assert used["train"]["placement"] == {"name": "randomised", "range": 64}
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "by seed" in capsys.readouterr().out


@pytest.mark.parametrize("scale", ["CPU", "PAPER"])
def test_randomised_positions_have_room(scale):
    suite = module("addition_fire")
    sizes = getattr(suite, scale)
    task = tasks.make(sizes.spec)
    assert sizes.span >= 2 * generalization.row_length(task, [sizes.lengths[-1]], multiple=1)
    assert set(sizes.lengths) & set(tasks.span(task.test))
    cfg = suite._config(sizes, sizes.spec)
    positions.make_placement(cfg.train.placement).check(cfg.data.length)
