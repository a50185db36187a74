"""Schedules and optimisers against hand-computed values and optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcm import models, training
from lcm.errors import ConfigError


@pytest.fixture
def train(tiny):
    return lambda *keys: tiny(*(f"train.{key}" for key in keys)).train


def test_cosine_by_hand(train):
    rate = training.schedule(train("steps=100", "warmup=10", "lr=1.0", "final_lr=0.1"))
    assert float(rate(0)) == pytest.approx(0.1)  # the first step already learns
    assert float(rate(9)) == pytest.approx(1.0)
    assert float(rate(55)) == pytest.approx(0.55)  # half way down
    assert float(rate(100)) == pytest.approx(0.1)


def test_wsd_is_flat_then_falls_linearly(train):
    keys = ("steps=100", "warmup=10", "lr=1.0", "final_lr=0.0", "schedule=wsd", "decay=0.2")
    rate = training.schedule(train(*keys))
    assert [float(rate(s)) for s in (10, 50, 80)] == pytest.approx([1, 1, 1])
    assert [float(rate(s)) for s in (85, 90, 100)] == pytest.approx([0.75, 0.5, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["warmup=200", "steps=100"], "warmup=200 must lie between 0 and train.steps=100"),
        (["schedule=linear"], "'linear' is unknown: choose from cosine, wsd, constant"),
        (["steps=0"], "train.steps=0 must be at least 1"),
    ],
)
def test_schedule_refusals(train, keys, message):
    with pytest.raises(ConfigError, match=message):
        training.schedule(train(*keys))


def test_unknown_optimizer(train):
    with pytest.raises(ConfigError, match="'sgd' is unknown: choose from adamw, muon"):
        training.optimizer(train("optimizer=sgd"))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_spares_norms_biases_and_embeddings(tiny, name):
    """With gradients of zero only the decay moves a parameter."""
    keys = ["positions=learned", "tied=False", "norm=layer", "biases=all", "embed_norm=True"]
    cfg = tiny(f"train.optimizer={name}", *(f"model.{key}" for key in keys))
    params = jax.tree.map(lambda x: x + 1, models.init(cfg, jax.random.key(0)))
    rule = training.optimizer(cfg.train)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates = jax.jit(lambda zero, params: rule.update(zero, rule.init(params), params)[0])(
        zero, params
    )
    moved = {
        jax.tree_util.keystr(k, simple=True, separator="/"): bool(np.any(u != 0))
        for k, u in jax.tree_util.tree_leaves_with_path(updates)
    }
    decayed = {k for k, m in moved.items() if m}
    matrices = {f"layers/0/mixer/{w}" for w in ("q", "k", "v", "out")}
    matrices |= {f"layers/0/mlp/{w}" for w in ("gate", "up", "down")}
    assert decayed == matrices | {"head/kernel"}


def test_adamw_equals_optax(tiny):
    cfg = tiny("train.weight_decay=0.3", "train.clip=0.5")
    params = models.init(cfg, jax.random.key(0))
    mask = jax.tree.map(lambda p: p.ndim == 3, params)  # no untied head: the layers' matrices
    rate = training.schedule(cfg.train)
    adamw = optax.adamw(rate, 0.9, 0.95, weight_decay=0.3, mask=mask)
    ours, theirs = training.optimizer(cfg.train), optax.chain(optax.clip_by_global_norm(0.5), adamw)
    got, want = params, params
    mine, other = ours.init(params), theirs.init(params)
    for scale in (37.0, 11.0):
        gradient = jax.tree.map(lambda p, s=scale: jnp.sin(s * p), params)
        step, mine = ours.update(gradient, mine, got)
        got = optax.apply_updates(got, step)
        step, other = theirs.update(gradient, other, want)
        want = optax.apply_updates(want, step)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)


def test_muon_makes_matrix_updates_orthogonal_and_adam_the_rest(tiny):
    cfg = tiny("train.optimizer=muon", "train.weight_decay=0", "train.warmup=0", "train.clip=0")
    params = models.init(cfg, jax.random.key(0))
    gradient = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    rule = training.optimizer(cfg.train)
    updates, _ = rule.update(gradient, rule.init(params), params)
    for layer in range(2):
        values = np.linalg.svd(updates["layers"]["0"]["mlp"]["up"][layer], compute_uv=False)
        assert values.max() / values.min() < 3  # Newton-Schulz leaves them between 0.7 and 1.2
    nadam = optax.nadam(
        training.schedule(cfg.train), 0.9, 0.95
    )  # optax gives the rest Nesterov too
    want, _ = nadam.update(gradient, nadam.init(params), params)
    np.testing.assert_allclose(updates["embedding"]["table"], want["embedding"]["table"], rtol=1e-4)
