"""Tokens left out between layers: which, and what the layers above make of the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import models
from lcm.errors import ConfigError
from lcm.models import decimation, decoder
from lcm.models.decimation import Decimation

LENGTH = 30


@pytest.fixture(params=["mamba1", "mamba2"], scope="module")
def made(request):
    from lcm import config

    keys = f"model.pattern={request.param}", "model.depth=3", "model.mlp=none", "model.width=16"
    cfg = config.override(config.shrink(config.base()), keys)
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, 256)
    return models.spec(cfg), models.init(cfg, jax.random.key(0)), tokens


def read(made, how):
    spec, params, tokens = made
    context = models.default_context(tokens.shape)
    return jax.jit(lambda p: decimation.read(spec, p, tokens, context, how))(params)


@pytest.mark.quick("mamba2")
def test_what_is_short_enough_is_read_as_ever(made):
    spec, params, tokens = made
    logits, kept = read(made, Decimation((1,), base=LENGTH, least=5))
    context = models.default_context(tokens.shape)
    want, _ = decoder.apply(spec, params, tokens, context, None)
    np.testing.assert_allclose(logits, want, atol=1e-5)
    assert (kept == jnp.arange(LENGTH)).all()


@pytest.mark.quick("mamba1")
def test_the_largest_steps_and_the_end_are_kept_and_the_rest_is_not_seen(made):
    spec, params, tokens = made
    how = Decimation((1,), base=8, response=4, least=2)
    logits, kept = read(made, how)
    assert logits.shape[:2] == kept.shape == (2, 12)
    assert (jnp.diff(kept, axis=1) > 0).all() and (kept[:, -4:] == jnp.arange(26, 30)).all()
    assert (kept[0] != kept[1]).any()  # each row its own
    context = models.default_context(tokens.shape)
    run = jax.jit(decoder.block(spec.layers[0]).apply, static_argnames="method")
    layers = [jax.tree.map(lambda x, n=n: x[n], params["layers"]["0"]) for n in range(3)]
    x = decoder.embedded(spec, params, tokens, context, {})
    x, _ = run(layers[0], x, context, None, {})
    steps = run(layers[1], x, context, method="importance")
    for row in range(2):
        want = np.sort(np.argsort(-np.asarray(steps[row, :26]))[:8])
        assert (kept[row, :8] == want).all()
    # The layer above reads the kept tokens alone, one after another.
    alone = context._replace(pace_BL=jax.vmap(lambda at: jnp.zeros(30).at[at].set(1.0))(kept))
    x, _ = run(layers[1], x, alone, None, {})
    short = jnp.take_along_axis(x, kept[..., None], 1)
    x, _ = run(layers[2], short, models.default_context((2, 12)), None, {})
    want = decoder.logits(spec, params, decoder.final_norm(spec, params, x))
    np.testing.assert_allclose(logits, want, atol=2e-5)


def test_counts_are_those_of_the_paper():
    how = Decimation((12, 16), base=2000, response=50)
    assert how.count(1000, 0) == 1000 and how.count(9000, 0) == 2050
    assert how.count(9000, 1) == 1050
    assert Decimation((0,), base=4, response=1).count(100, 0) == 21  # no fewer than 20


@pytest.mark.parametrize(
    ("pattern", "how", "message"),
    [
        ("mamba2", Decimation((4,), base=8), "layer 4 is none of 2"),
        ("lstm", Decimation((1,), base=8), "layer 1 is lstm"),
        ("mamba2", Decimation((1, 0), base=8), "not in order"),
        ("mamba2", Decimation((0,), base=0), "keep nothing"),
        ("mamba2", Decimation((0,), base=8, beta=float("nan")), "beta=nan"),
        ("mamba2", Decimation((0,), base=8, response=50), "from 1 to 30"),
    ],
)
def test_what_cannot_be_is_refused(tiny, pattern, how, message):
    spec = models.spec(tiny(f"model.pattern={pattern}", "model.depth=2"))
    with pytest.raises(ConfigError, match=message):
        decimation.check(spec, how, LENGTH)
