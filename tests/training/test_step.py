"""The step function: what it computes, in one process."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcm import models, training
from lcm.types import Batch, Context


def packed_batch(rows: int = 8, length: int = 32) -> Batch:
    """Rows of two documents and some padding, each row cut elsewhere."""
    key = jax.random.key(7)
    tokens = jax.random.randint(key, (rows, length + 1), 0, 256)
    cut, end = 9 + jnp.arange(rows)[:, None], length - jnp.arange(rows)[:, None]
    place = jnp.arange(length)[None]
    positions = jnp.where(place < cut, place, place - cut)
    segments = jnp.where(place < cut, 1, 2) * (place < end)
    context = Context(positions, segments, jnp.full_like(positions, -1))
    weight = (segments > 0).astype(jnp.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], context, weight)


def run(cfg, batch, steps=1):
    spec, rule = models.spec(cfg), training.optimizer(cfg.train)
    state = training.init_state(spec, rule, jax.random.key(cfg.seed), cfg.train.ema)
    step = jax.jit(training.make_step(spec, rule, cfg))
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


def test_loss_is_the_weighted_mean_of_the_losses(tiny):
    cfg, batch = tiny("train.position_bins=8"), packed_batch()
    _, metrics = run(cfg, batch)
    params = models.init(cfg, jax.random.key(cfg.seed))
    logits, _ = models.apply(cfg, params, batch.tokens_BL, batch.context)
    nll = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets_BL))
    weight = np.asarray(batch.loss_weight_BL)
    assert float(metrics["loss"]) == pytest.approx((nll * weight).sum() / weight.sum(), rel=1e-5)
    assert float(metrics["tokens"]) == weight.sum()
    place = np.asarray(batch.context.positions_BL) // 4
    for i, got in enumerate(metrics["loss_by_position"]):
        chosen = weight * (place == i)
        if chosen.sum():
            assert float(got) == pytest.approx((nll * chosen).sum() / chosen.sum(), rel=1e-5)
        else:  # no document is that long
            assert np.isnan(got) and i >= 6


@pytest.mark.quick("4")
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_whole_batch(tiny, parts):
    batch = packed_batch()
    want, want_metrics = run(tiny("train.warmup=0"), batch)
    got, got_metrics = run(tiny("train.warmup=0", f"train.accumulate={parts}"), batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got_metrics, want_metrics
    )
    # Adam's first step divides by the gradient's size, so tiny gradients are compared loosely.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got.params, want.params)


def test_z_loss_pulls_the_normaliser_to_zero(tiny):
    """log Z is free at first, so the coefficient shows in the gradient and not in the loss."""
    batch = packed_batch()
    _, plain = run(tiny("train.z_loss=0"), batch)
    _, pulled = run(tiny("train.z_loss=0.1"), batch)
    assert float(plain["loss"]) == float(pulled["loss"])
    assert abs(float(plain["grad_norm"]) - float(pulled["grad_norm"])) > 1e-2


def test_average_follows_the_parameters(tiny):
    cfg, batch = tiny("train.ema=0.5", "train.warmup=0"), packed_batch()
    before = models.init(cfg, jax.random.key(cfg.seed))
    state, _ = run(cfg, batch)
    want = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, before, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.average, want)


def test_golden_first_steps(tiny):
    """Loss and gradient norm of three steps.

    They may change when initialisation, architecture, loss or optimiser change on purpose, and
    never by accident. The first loss is also near ln 320 = 5.77, that of a uniform model.
    """
    batch = packed_batch()
    got = [run(tiny("train.warmup=0"), batch, steps)[1] for steps in (1, 2, 3)]
    figures = [(float(m["loss"]), float(m["grad_norm"])) for m in got]
    np.testing.assert_allclose(figures, GOLDEN, rtol=2e-4)


GOLDEN = [(6.164622, 2.186683), (5.451049, 1.803701), (4.927036, 1.648989)]


def test_learns_a_repeated_batch(tiny):
    batch = packed_batch()
    _, first = run(tiny("train.warmup=0"), batch)
    _, last = run(tiny("train.warmup=0", "train.schedule=constant"), batch, steps=30)
    assert float(last["loss"]) < float(first["loss"]) - 2


@pytest.mark.quick("True")
@pytest.mark.parametrize("tied", [True, False])
def test_logits_in_pieces_give_the_same_step(tiny, monkeypatch, tied):
    batch, cfg = packed_batch(), tiny("train.warmup=0", f"model.tied={tied}")
    want, want_metrics = run(cfg, batch)
    monkeypatch.setattr(training.scores, "LOGITS", 40 * cfg.model.vocab)
    monkeypatch.setattr(training.scores, "HELD", 80 * cfg.model.vocab)
    got, got_metrics = run(cfg, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got_metrics, want_metrics
    )
    # Gradients, by Adam's means of them: its first step is their signs, however small they are.
    gradients = [optax.tree.get(state.opt_state, "mu") for state in (got, want)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), *gradients)
    step = training.make_step(models.spec(cfg), training.optimizer(cfg.train), cfg)
    made = str(jax.make_jaxpr(step)(want, batch))
    assert f"f32[8,32,{cfg.model.vocab}]" not in made and f"f32[256,{cfg.model.vocab}]" not in made
