"""Hidden attention, the distance that heads read from, and clocks that are slowed by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import models
from lcm.errors import ConfigError
from lcm.models import decoder
from lcm.models.distance import mean_distance, mean_distances, slowed
from lcm.nn import MIXERS, mamba1, mamba2

LENGTH = 24
MAMBAS = {"mamba1": "model.state=4", "mamba2": "model.groups=2"}


def case(tiny, mixer, *keys):
    cfg = tiny(f"model.pattern={mixer}", MAMBAS[mixer], "model.depth=2", "model.mlp=none", *keys)
    params = models.init(cfg, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, cfg.model.vocab)
    return cfg, params, tokens


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_distance_of_one_decay_is_known(decay):
    weights = decay ** jnp.arange(4000.0)[::-1]
    got = float(mean_distance(weights[None, :, None])[0, 0])
    assert got == pytest.approx(decay / (1 - decay), rel=1e-4)
    assert float(mean_distance(jnp.ones((1, 41, 1)))[0, 0]) == 20


@pytest.mark.quick("mamba2")
@pytest.mark.parametrize("mixer", MAMBAS)
def test_hidden_attention_makes_the_output_of_the_recurrence(tiny, mixer, monkeypatch):
    cfg, params, _ = case(tiny, mixer)
    kept = {}

    def keeping(name, function):
        def run(*given, **more):
            kept[name], *_ = found = function(*given, **more)
            return found

        return run

    owner, name = {
        "mamba1": (mamba1, "selective_scan"),
        "mamba2": (mamba2.interventions, "matrix"),
    }[mixer]
    monkeypatch.setattr(owner, name, keeping("y", getattr(owner, name)))
    monkeypatch.setattr(MIXERS[mixer], "_read", keeping("x", MIXERS[mixer]._read))
    block = decoder.block(models.spec(cfg).layers[0])
    own = jax.tree.map(lambda leaf: leaf[0], params["layers"]["0"])
    x_BLD = jax.random.normal(jax.random.key(2), (2, LENGTH, cfg.model.width))
    context = models.default_context((2, LENGTH))
    block.apply(own, x_BLD, context, None, {})
    weights_BLH = block.apply(own, x_BLD, context, method="hidden_attention")
    x_BLHP = kept["x"].reshape(*weights_BLH.shape, -1)
    want = jnp.einsum("blh,blhp->bhp", weights_BLH, x_BLHP)
    np.testing.assert_allclose(kept["y"][:, -1].reshape(want.shape), want, rtol=1e-3, atol=1e-6)


def test_layers_that_read_are_told_by_their_place(tiny):
    cfg, params, tokens = case(tiny, "mamba2")
    hybrid = tiny("model.pattern=attention,mamba2", "model.depth=4")
    found = mean_distances(models.spec(hybrid), models.init(hybrid, jax.random.key(0)), tokens)
    assert sorted(found) == [1, 3] and found[1].shape == (hybrid.model.heads,)
    assert np.all((found[3] > 0) & (found[3] < LENGTH - 1))

    # Steps of nothing forget nothing: all tokens alike, from 0 to the first.
    kept = params["layers"]["0"]["mixer"]
    still = {**kept, "A_log": jnp.full_like(kept["A_log"], -100), "conv_bc": 0 * kept["conv_bc"]}
    still |= {"dt": 0 * kept["dt"], "conv_bc_bias": jnp.ones_like(kept["conv_bc_bias"])}
    still = {**params, "layers": {"0": {**params["layers"]["0"], "mixer": still}}}
    for distance_H in mean_distances(models.spec(cfg), still, tokens).values():
        np.testing.assert_allclose(distance_H, (LENGTH - 1) / 2, rtol=1e-5)


@pytest.mark.quick("mamba2")
@pytest.mark.parametrize("mixer", MAMBAS)
def test_clocks_that_all_run_slower_are_the_extension(tiny, mixer):
    cfg, params, tokens = case(tiny, mixer)
    clocked = case(tiny, mixer, "model.options=clocked=True")[0]
    spec, own = models.spec(clocked), models.adopt(clocked, params, jax.random.key(0))
    assert jax.tree.structure(own) == jax.tree.structure(models.init(clocked, jax.random.key(0)))
    plain, _ = models.apply(cfg, params, tokens)
    same, _ = models.apply(clocked, own, tokens)
    np.testing.assert_array_equal(same, plain)

    distances = mean_distances(models.spec(cfg), params, tokens)
    slow, _ = models.apply(clocked, slowed(spec, own, distances, 0.25, 1.0), tokens)
    other = case(tiny, mixer, "model.extension=step=0.25")[0]
    want, _ = models.apply(other, params, tokens)
    np.testing.assert_allclose(slow, want, atol=1e-5)
    assert float(jnp.abs(want - plain).max()) > 1e-3

    one = slowed(spec, own, distances, 0.25, 0.01)["layers"]["0"]["mixer"]["clock"]
    for n, clock_H in enumerate(np.asarray(one)):
        assert np.flatnonzero(clock_H == 0.25).tolist() == [int(np.argmax(distances[n]))]
        assert (clock_H == 1).sum() == len(clock_H) - 1


def test_what_has_no_distance_or_clock_is_refused(tiny):
    cfg, params, tokens = case(tiny, "mamba2")
    with pytest.raises(ConfigError, match=r"layers of gla have no hidden attention .*mamba1"):
        mean_distances(models.spec(tiny("model.pattern=gla")), {}, tokens)
    with pytest.raises(ConfigError, match=r"leave model\.extension out"):
        mean_distances(models.spec(case(tiny, "mamba2", "model.extension=step=0.5")[0]), {}, tokens)
    distances = {0: np.ones(2)}
    with pytest.raises(ConfigError, match="layer 0 is mamba2 without a clock"):
        slowed(models.spec(cfg), params, distances, 0.5, 0.5)
    for step, share in ((0.0, 0.5), (float("nan"), 0.5), (0.5, 0.0), (0.5, 1.5)):
        with pytest.raises(ConfigError, match=f"step={step}, share={share}"):
            slowed(models.spec(cfg), params, distances, step, share)
