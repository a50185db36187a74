"""Seeds side by side: each as if alone, resumed to the bit, scales tuned alone."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lcm import positions
from lcm.errors import TrainingError
from lcm.evaluation.generalization import batches_of
from lcm.training import seeds

SPEC = "task:parity,train=1-3,test=4-5"


@pytest.fixture
def cfg(tiny):
    words = [f"data.source={SPEC}", f"data.tokenizer={SPEC}", "data.packing=first_fit"]
    small = ["model.depth=1", "train.steps=6", "checkpoint.every=2", "train.log_every=1"]
    small += ["model.width=16", "data.length=32"]
    return tiny(*words, *small, "train.placement=randomised", "train.warmup=2")


def leaves(params):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def test_a_seed_is_what_it_is_alone(cfg, tmp_path):
    both = seeds.train_seeds(cfg, tmp_path / "both", [3, 5], batches_of(cfg))
    alone = seeds.train_seeds(cfg, tmp_path / "alone", [5], batches_of(cfg))
    for one, two in zip(leaves(both), leaves(alone), strict=True):
        np.testing.assert_allclose(one[1], two[0], atol=1e-5)
        assert one.size < 100 or not np.allclose(one[0], one[1], atol=1e-3)


@pytest.mark.slow
def test_an_interrupted_run_ends_where_it_would_have(cfg, tmp_path):
    whole = seeds.train_seeds(cfg, tmp_path / "whole", [0, 1], batches_of(cfg))
    given = batches_of(cfg)
    taken = []

    def broken(seed, step):
        if step == 5:
            raise KeyboardInterrupt
        return given(seed, step)

    def counted(seed, step):
        taken.append(step)
        return given(seed, step)

    with pytest.raises(KeyboardInterrupt):
        seeds.train_seeds(cfg, tmp_path / "broken", [0, 1], broken)
    resumed = seeds.train_seeds(cfg, tmp_path / "broken", [0, 1], counted)
    assert taken == [4, 4, 5, 5]
    for one, two in zip(leaves(whole), leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_scales_are_tuned_alone(cfg, tmp_path, tiny):
    before = seeds.train_seeds(cfg, tmp_path / "before", [0, 1], batches_of(cfg))
    scaled = positions.Chain(positions.HeadScale(1.5), positions.NoPE())
    cfg.model.positions = ConfigDict(positions.config(scaled))
    cfg.train.update(only="head_scale", lr=0.1)
    after = seeds.train_seeds(cfg, tmp_path / "after", [0, 1], batches_of(cfg), start=before)
    found = dict(jax.tree.leaves_with_path(after))
    for path, leaf in jax.tree.leaves_with_path(before):
        np.testing.assert_array_equal(leaf, found.pop(path))
    ((path, scales),) = found.items()
    assert "head_scale" in jax.tree_util.keystr(path)
    assert scales.shape == (2, 1, 2) and (scales != 1.5).all() and (scales >= 1).all()


def test_a_loss_that_is_no_number_is_not_saved(cfg, tmp_path):
    given = batches_of(cfg)

    def endless(seed, step):
        batch = given(seed, step)
        return batch._replace(loss_weight_BL=np.full_like(batch.loss_weight_BL, np.inf))

    with pytest.raises(TrainingError, match="not finite"):
        seeds.train_seeds(cfg, tmp_path, [0], endless)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
