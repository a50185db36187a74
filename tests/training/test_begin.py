"""Runs that begin with another run's parameters, train some alone, and place tokens elsewhere."""

import jax
import numpy as np
import pytest

from lcm import evaluation, models, training
from lcm.errors import ConfigError
from lcm.evaluation import results
from lcm.parallel import path

SHORT = ("train.steps=6", "checkpoint.every=3", "train.warmup=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A NoPE run and one with a learned table: workdirs by encoding."""
    from lcm import config

    folder, runs = tmp_path_factory.mktemp("trained"), {}
    for name in ("nope", "learned"):
        cfg = config.shrink(config.base())
        cfg = config.override(cfg, [f"model.positions={name}", *SHORT])
        training.train(cfg, folder / name)
        runs[name] = folder / name
    return runs


def parameters(folder) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(evaluation.load(folder).params)
    return {path(keys): np.asarray(leaf) for keys, leaf in leaves}


@pytest.mark.slow
def test_scales_of_heads_are_tuned_alone_and_stay_above_one(trained, tiny, tmp_path):
    cfg = tiny(
        "model.positions=head_scale+nope",
        "model.positions.first.factor=1.05",
        f"train.init={trained['nope']}",
        "train.only=head_scale",
        "train.lr=0.1",
        "train.weight_decay=0",
        *SHORT,
    )
    training.train(cfg, tmp_path / "run")
    before, after = parameters(trained["nope"]), parameters(tmp_path / "run")
    (new,) = after.keys() - before.keys()
    assert new == "layers/0/mixer/positions/first/head_scale"
    assert after[new].shape == (cfg.model.depth, cfg.model.heads)
    assert np.all(after[new] >= 1) and np.all(after[new] != np.float32(1.05))
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


@pytest.mark.slow
def test_a_learned_table_is_stretched_and_its_kept_rows_stay(trained, tiny, tmp_path):
    cfg = tiny(
        "model.positions=learned",
        "model.positions.length=112",
        "model.positions.keep=5",
        "train.placement=segmented",
        "train.placement.factor=3",
        f"train.init={trained['learned']}",
        *SHORT,
    )
    training.train(cfg, tmp_path / "run")
    before, after = parameters(trained["learned"]), parameters(tmp_path / "run")
    old, new = (run["positions/model/table"] for run in (before, after))
    assert old.shape[0] == 32 and new.shape[0] == 112
    np.testing.assert_array_equal(new[:5], old[:5])
    stretched = models.adopt(cfg, evaluation.load(trained["learned"]).params, jax.random.key(0))
    moved = np.abs(new - stretched["positions"]["model"]["table"]).max(-1)
    assert np.all(moved[:5] == 0) and np.any(moved[64:96] > 0) and np.all(moved[96:] == 0)


@pytest.mark.slow
def test_evaluation_takes_what_an_encoding_needs_anew(trained):
    file = evaluation.evaluate_run(
        trained["nope"],
        ["model.positions=head_scale+nope", "eval.multiples=1", "eval.tokens=256"],
    )
    plain = evaluation.evaluate_run(trained["nope"], ["eval.multiples=1", "eval.tokens=256"])
    assert results.load(file)["lengths"] == results.load(plain)["lengths"]


@pytest.mark.slow
def test_a_placement_changes_training_and_resumes_bit_for_bit(tiny, tmp_path):
    from runs import losses

    common = ("train.placement=pose", "train.placement.factor=3", "train.placement.text=2", *SHORT)
    training.train(tiny(*common, "train.steps=3", "train.schedule=constant"), tmp_path / "part")
    training.train(tiny(*common, "train.schedule=constant"), tmp_path / "one")
    training.train(tiny(*common, "train.schedule=constant"), tmp_path / "part")
    training.train(tiny("train.schedule=constant", *SHORT), tmp_path / "plain")
    got, want = losses(tmp_path / "part"), losses(tmp_path / "one")
    assert {step: got[step] for step in want} == want  # the stopped run logged its last step too
    assert losses(tmp_path / "plain") != want
    far = losses(tmp_path / "one")[6][2]  # positions past the trained length are in the last bin
    assert far[-1] is not None


def test_what_cannot_be_begun_is_refused(trained, tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"train.init=.*nowhere holds no checkpoint"):
        training.check(tiny(f"train.init={tmp_path}/nowhere"))
    with pytest.raises(ConfigError, match=r"another model: .* is \(320, 32\), this .* \(320, 64\)"):
        training.check(tiny(f"train.init={trained['nope']}", "model.width=64"))
    with pytest.raises(ConfigError, match=r"train\.only='slope' is found in no parameter"):
        training.check(tiny("train.only=slope"))
    with pytest.raises(ConfigError, match="no regular expression"):
        training.check(tiny("train.only=(", "train.placement=plain"))
    with pytest.raises(ConfigError, match=r"range=8 has no room for a row of data.length=32"):
        training.check(tiny("train.placement=randomised", "train.placement.range=8"))
    with pytest.raises(
        ConfigError, match=r"train\.placement='posse' is unknown: choose from plain"
    ):
        tiny("train.placement=posse")
