"""The experiments on recurrent models at a tiny scale: whole, and nothing twice."""

import importlib.util
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from lcm import models, reproduce
from lcm.models import decoder
from lcm.training import seeds

ONE_SEED = """
import jax, jax.numpy as jnp
from lcm.ops.recurrence import op_matrix
from lcm.training.seeds import _over_seeds

def loss(q, k, v, decay):
    return (op_matrix(q, k, v, decay)[0] ** 2).sum()

x = jax.random.normal(jax.random.key(0), (1, 2, 64, 4, 16))
gradient = jax.jit(_over_seeds(jax.grad(loss, (0, 1, 2, 3))))(x, x + 1, x, -jnp.abs(x))
print(all(bool(jnp.isfinite(each).all()) for each in gradient))
"""


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
        assert "Accuracy at 2-4 T after more training" in page
        tables = (tmp_path / "tables.md").read_text()
        assert "| mamba2 |" in tables and tables.count("\n| --- ") == 5
        assert set(found["conv, gla"]) == {"from nothing"}
        assert {len(one) for one in found["mamba2"].values()} == {2}  # seeds
        seeds_of = [one for kind in found["mamba2"].values() for one in kind]
    else:
        assert {len(one["seeds"]) for one in found.values()} == {2}
        assert "seeds apart" in page
        seeds_of = [seed for one in found.values() for seed in one["seeds"]]
    if name == "hybrid_recall":
        extended = {key: set(one["seeds"][0]["extended"]) for key, one in found.items()}
        assert extended == {
            **{"mm": {"steps"}, "mn": set(), "rr": set()},
            "mr": {"rotations", "frequencies", "steps", "both"},
        }
        assert "mr, both, s by band" in page
    for one in seeds_of:
        assert all(0 <= x <= 1 for x in one["accuracy"])
    monkeypatch.setattr(decoder, "init", _fail)
    reproduce.run(name, tmp_path, "tiny")
    assert (tmp_path / "results.json").read_text() == result


@pytest.mark.slow
def test_compression_whole_and_nothing_twice(tmp_path, monkeypatch):
    reproduce.run("compression", tmp_path, "tiny")
    found = json.loads((tmp_path / "results.json").read_text())
    assert {name: one["prefix"] for name, one in found.items()} == {
        **{"c=4": 4, "c=8": 2, "c=16": 1},
        "c=8, last layer": 2,
    }
    assert set(found["c=8"]) == {"prefix", "one", "several", "several, taught", "one, taught"}
    assert all(0 <= one["one"]["right"] <= 1 for one in found.values())
    assert "| c=16 | 1 |" in (tmp_path / "tables.md").read_text()
    monkeypatch.setattr(decoder, "init", _fail)
    reproduce.run("compression", tmp_path, "tiny")
    assert json.loads((tmp_path / "results.json").read_text()) == found


@pytest.mark.slow
def test_irregular_times_whole_and_nothing_twice(tmp_path, monkeypatch):
    reproduce.run("irregular_times", tmp_path, "tiny")
    result = (tmp_path / "results.json").read_text()
    found = json.loads(result)
    trained = {name: one for name, one in found.items() if "parameters" in one}
    assert set(trained) == {"index", "past, clock", "next, both"}
    assert {(len(one["seeds"]), one["parameters"]) for one in trained.values()} == {(2, 4076)}
    (best,) = found["Bayes, next"]["seeds"]
    assert best["above"] == best["within"][:2] == best["beyond"][:2] == [0, 0]
    for one in trained.values():
        for seed in one["seeds"]:
            assert np.subtract(seed["nats"], best["nats"]) == pytest.approx(seed["above"])
            assert np.mean(seed["within"]) == pytest.approx(seed["above"][0])  # of equal size
    tables = (tmp_path / "tables.md").read_text()
    assert tables.count("| past, clock |") == 4 and tables.count("| Bayes, next |") == 1
    assert "seeds apart" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(decoder, "init", _fail)
    reproduce.run("irregular_times", tmp_path, "tiny")
    assert (tmp_path / "results.json").read_text() == result


def _module(name):
    file = reproduce.FOLDER / name / "experiment.py"
    spec = importlib.util.spec_from_file_location(f"{name}_tables", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_extensions_are_of_the_side_and_by_the_factor_that_they_say():
    module = _module("hybrid_recall")
    assert module.factors(module.CPU) == [2, 4, 8, 16, 32]
    by_factor = {"2": [0.1, 0.2, 0.3], "4": [0.4, 0.5, 0.6]}
    assert module.as_asked([1.0, 0.0, 0.0], by_factor) == [1.0, 0.2, 0.6]
    found = {}
    for side in module.SIDES["mr"]:
        layers = models.spec(module.extended(module.CPU, "mr", side, 8)).layers
        mamba, attention = sorted(layers, key=lambda layer: layer.attends)
        encoding = attention.positions
        found[side] = mamba.extension.step, getattr(encoding, "factor", 1)
        assert (getattr(encoding, "attention_factor", None) == 1) == (side == "frequencies")
    assert found == {
        **{"rotations": (1, 8), "frequencies": (1, 8)},
        **{"steps": (1 / 8, 1), "both": (1 / 8, 8)},
    }


def test_models_are_told_of_the_times_that_they_say():
    module = _module("irregular_times")
    streams = module.TINY.task.streams((1,), 2, 8)
    tau_BL = np.diff(streams.times)
    before_BL = np.pad(tau_BL[:, :-1], ((0, 0), (1, 0)))
    for name, model in module.MODELS.items():
        context = module.batch_of(module.TINY, model, streams).context
        told = {"past": before_BL, "next": tau_BL}
        for kind, got in ((model.embedded, context.interval_BL), (model.clock, context.pace_BL)):
            assert (got is None) == (kind == ""), name
            if kind:
                np.testing.assert_allclose(got[:, 1:], told[kind][:, 1:], rtol=1e-6)
        embeds = module.config_of(module.TINY, model).model.positions.name == "intervals"
        assert embeds == bool(model.embedded)
        if model.clock == "past":
            assert (context.pace_BL[:, 0] == 1).all()  # the first token is written
        if model.embedded == "past":
            assert (context.interval_BL[:, 0] == 0).all()
    assert module.MODELS["index"] == ("", "") and module.MODELS["next, both"] == ("next", "next")


def test_what_is_refused_is_told_from_what_has_not_been_run():
    module = _module("recurrent_length")
    found = {"from nothing": [{"accuracy": [1.0, 0.25]}, {"accuracy": [1.0, 0.5]}]}
    names = ["from nothing", "passed", "step 1/2", "norms held", "window T"]
    line = module.at_the_end(module.Study("rwkv7_channels"), found, names)
    assert line == ["rwkv7_channels", "0.375", "–", "refused", "–", "refused"]
    near = module.Study("mamba2", 1, 12, led=True)
    assert near.name == "conv, mamba2, last 12 pairs"
    assert near.folder == "conv_mamba2_last_12_pairs" and near.pattern == "gated_conv,mamba2"
    assert module.possible(near) == []
    assert {"window T", module.DECIMATED} <= set(module.possible(module.Study("mamba2")))


def test_one_seed_has_no_axis_of_its_own():
    def one(x):
        assert x.ndim == 1
        return x + 1, x.sum()

    for count in (1, 3):
        x = jnp.arange(2.0 * count).reshape(count, 2)
        more, total = seeds._over_seeds(one)(x)
        np.testing.assert_array_equal(more, x + 1)
        np.testing.assert_array_equal(total, x.sum(1))


@pytest.mark.slow
def test_one_seed_of_decays_by_channel_does_not_end_the_process():
    """In a process of its own, which XLA ended where a chunk had an axis of one before it."""
    ran = subprocess.run([sys.executable, "-c", ONE_SEED], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "True\n"), ran.stderr
