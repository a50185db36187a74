"""What recurrent states of a batch begin with, and what is kept of them for the next."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import models, parallel, training
from lcm.errors import ConfigError
from lcm.models import initial
from lcm.nn import MIXERS
from lcm.nn.spec import ATTENTION
from lcm.training import carry
from lcm.types import Batch

SMALL = "model.depth=1", "model.width=16", "model.mlp=none", "train.warmup=0", "train.batch=4"
RECURRENT = sorted(set(MIXERS) - {*ATTENTION})


def batch_of(tokens, start=0):
    context = models.default_context(tokens[:, :-1].shape, start)
    weight = jnp.ones(tokens[:, :-1].shape, jnp.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], context, weight)


def begun(cfg):
    spec, rule = models.spec(cfg), training.optimizer(cfg.train)
    carried = carry.init(spec, cfg.train)
    state = training.init_state(spec, rule, jax.random.key(cfg.seed), 0.0, carried)
    return state, jax.jit(training.make_step(spec, rule, cfg))


@pytest.fixture
def tokens():
    return jax.random.randint(jax.random.key(5), (4, 17), 0, 256)


@pytest.mark.slow
def test_a_step_carries_the_states_of_every_mixer(tiny):
    """Traced alone: what is carried out has the shapes and names of what is carried in."""
    for mixer in RECURRENT:
        for kind in ("passed", "fitted"):
            cfg = tiny(*SMALL, f"model.pattern={mixer}", f"train.initial_state={kind}")
            spec, rule = models.spec(cfg), training.optimizer(cfg.train)
            state = training.abstract_state(cfg)
            batch = jax.eval_shape(lambda: batch_of(jnp.zeros((4, 9), jnp.int32)))
            after, _ = jax.eval_shape(training.make_step(spec, rule, cfg), state, batch)
            of = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
            assert of(after.carried) == of(state.carried), mixer
            # RWKV's channel mixing has the last token alone, which is passed on and not fitted.
            fits = kind == "passed" or not mixer.endswith("_channels")
            assert bool(jax.tree.leaves(after.carried)) == fits, mixer


@pytest.mark.quick("rglru")
@pytest.mark.parametrize("mixer", ["rglru", "mlstm"])
def test_final_states_are_passed_on(tiny, tokens, mixer):
    cfg = tiny(*SMALL, f"model.pattern={mixer}", "train.initial_state=passed")
    state, step = begun(cfg)
    batch = batch_of(tokens[:, :9])
    after, metrics = step(state, batch)
    logits, end = models.apply(
        cfg, state.params, batch.tokens_BL, state=models.init_state(cfg, 4, 8)
    )
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets_BL[..., None], 2)
    np.testing.assert_allclose(metrics["loss"], nll.mean(), rtol=1e-5)  # the first is as from zero
    want = end.layers[0]
    got = after.carried["layers"]["0"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got["memory"], want.memory
    )
    assert (after.carried["position_B"] == 8).all()
    last, metrics = step(after, batch)
    assert np.isfinite(metrics["loss"]) and (last.carried["position_B"] == 16).all()
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), got, last.carried["layers"]["0"])
    assert max(jax.tree.leaves(moved)) > 1e-6


def test_continued_rows_have_the_losses_of_whole_ones(tiny, tokens):
    """Of a convolution, whose inputs go on, and of retention, whose positions do."""
    keys = (
        *SMALL,
        *("model.pattern=mamba2,retnet", "model.depth=2"),
        "train.lr=0",
        "train.weight_decay=0",
        "train.z_loss=0",
    )
    state, step = begun(tiny(*keys, "train.initial_state=continued", "data.length=8"))
    state, first = step(state, batch_of(tokens[:, :9]))
    _, second = step(state, batch_of(tokens[:, 8:]))
    state, step = begun(tiny(*keys, "data.length=16"))
    _, whole = step(state, batch_of(tokens))
    np.testing.assert_allclose((first["loss"] + second["loss"]) / 2, whole["loss"], rtol=1e-5)
    _, alone = step(state, batch_of(tokens[:, 8:]))
    assert abs(float(alone["loss"] - second["loss"])) > 1e-4


@pytest.mark.quick("passed")
@pytest.mark.parametrize("kind", ["passed", "fitted"])
def test_microbatches_give_the_same_step(tiny, tokens, kind):
    found = []
    for parts in (1, 2):
        keys = f"train.initial_state={kind}", f"train.accumulate={parts}"
        state, step = begun(tiny(*SMALL, "model.pattern=rglru", *keys))
        for _ in range(2):
            state, metrics = step(state, batch_of(tokens))
        found.append((metrics["loss"], state.carried))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5), *found)


@pytest.mark.slow
def test_passed_states_are_of_other_rows_and_join_the_first_document(tiny, tokens):
    cfg = tiny(*SMALL, "model.pattern=mamba2", "train.initial_state=passed")
    spec = models.spec(cfg)
    state, step = begun(cfg)
    state, _ = step(state, batch_of(tokens))
    context = models.default_context((4, 6))
    segments = jnp.array([[0, 3, 3, 3, 4, 4]] * 4)
    context = context._replace(segments_BL=segments)
    start = carry.begin(spec, cfg.train, state.carried, state.step, jax.random.key(1), context)
    (layer,) = start.layers
    assert (layer.segment_B == 3).all()
    own = state.carried["layers"]["0"]["memory"]
    order = [next(j for j in range(4) if (layer.memory[:, i] == own[:, j]).all()) for i in range(4)]
    assert sorted(order) == [0, 1, 2, 3] and order != [0, 1, 2, 3]
    at = carry.placed(spec, context, start).positions_BL
    assert (at[:, 1:4] == context.positions_BL[:, 1:4] + 16).all()
    assert (at[:, 4:] == context.positions_BL[:, 4:]).all()

    def last(start):
        x, _ = models.decoder.hidden(spec, state.params, tokens[:, :6], context, start)
        return x

    none = carry.begin(spec, tiny(*SMALL).train, None, 0, jax.random.key(1), context)
    assert none is None
    apart = abs(last(start) - last(None)).max((0, 2))
    assert (apart[1:4] > 1e-5).all() and (apart[4:] == 0).all()


def test_fitted_and_noise_have_the_moments_they_should(tiny, tokens):
    cfg = tiny(*SMALL, "model.pattern=mamba2", "train.initial_state=fitted")
    spec, context = models.spec(cfg), models.default_context((512, 4))
    state, step = begun(cfg)
    state, _ = step(state, batch_of(tokens))
    start = carry.begin(spec, cfg.train, state.carried, state.step, jax.random.key(1), context)
    again = initial.fitted(start)
    for name in ("mean", "std"):
        (got,), (want,) = (
            jax.tree.leaves(getattr(again, name)),
            jax.tree.leaves(state.carried[name]),
        )
        np.testing.assert_allclose(got, want, rtol=0.05, atol=1e-3)
    assert not jnp.any(start.layers[0].tails[0])
    noise = tiny(*SMALL, "train.initial_state=noise", "train.initial_std=0.5").train
    start = carry.begin(spec, noise, None, 0, jax.random.key(1), context)
    assert float(start.layers[0].memory.std()) == pytest.approx(0.5, rel=0.02)


@pytest.mark.slow
def test_a_resumed_run_has_the_states_it_left(tiny, tmp_path):
    keys = "train.schedule=constant", "checkpoint.every=2", "train.log_every=1"
    small = (*SMALL, *keys, "model.pattern=mamba2", "train.initial_state=passed")
    whole = training.train(tiny(*small, "train.steps=4"), tmp_path / "whole")
    training.train(tiny(*small, "train.steps=2"), tmp_path / "cut")
    resumed = training.train(tiny(*small, "train.steps=4"), tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)


def test_states_lie_with_their_rows(tiny):
    cfg = tiny(*SMALL, "model.pattern=mamba2,attention", "train.initial_state=passed")
    cfg.model.depth = 2
    mesh = parallel.make(cfg, jax.devices()[:1])
    carried = training.abstract_state(cfg, mesh).carried
    assert list(carried["layers"]) == ["0"]  # attention has none
    assert carried["layers"]["0"]["memory"].sharding.spec[1] == ("data", "fsdp")
    assert carried["position_B"].sharding.spec[0] == ("data", "fsdp")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["train.initial_state=passed"], "attention alone"),
        (["train.initial_state=last", "model.pattern=mamba2"], "'last' is unknown"),
        (["train.initial_state=continued", "model.pattern=mamba2"], "corpus are shuffled"),
    ],
)
def test_what_cannot_be_is_refused(tiny, keys, message):
    with pytest.raises(ConfigError, match=message):
        training.check(tiny(*keys))
