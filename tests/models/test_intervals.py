"""Times between tokens: what is embedded of them, and the clock of Mamba-2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import models
from lcm.errors import ConfigError
from lcm.models import decoder
from lcm.nn.intervals import intervals, pace
from lcm.positions import interval_embedding

MAMBA = ("model.pattern=mamba2", "model.mlp=none", "model.depth=1", "model.vocab=20")
SIZES = ("model.width=8", "model.heads=2", "model.state=4")


def made(tiny, *overrides):
    cfg = tiny(*MAMBA, *SIZES, *overrides)
    return cfg, models.init(cfg, jax.random.key(0))


def test_embedding_is_its_formula():
    tau = jnp.array([[0.0, 1.0, 59.0]])
    got = interval_embedding(tau, 4, slowest=0.5, fastest=2.0)
    angle = np.log1p([0.0, 1.0, 59.0])[:, None] * [0.5, 2.0]
    np.testing.assert_allclose(got[0], np.concatenate([np.sin(angle), np.cos(angle)], 1), atol=1e-6)
    assert interval_embedding(tau, 32).shape == (1, 3, 32)


@pytest.mark.parametrize(
    ("width", "speeds", "match"),
    [(3, (1.0, 2.0), "width 3"), (0, (1.0, 2.0), "width 0"), (2, (0.0, 1.0), r"0\.0 to 1")],
)
def test_embeddings_that_are_none_are_refused(width, speeds, match):
    with pytest.raises(ValueError, match=match):
        interval_embedding(jnp.ones((1, 2)), width, slowest=speeds[0], fastest=speeds[1])


def test_intervals_are_added_to_embeddings_of_text_that_has_them(tiny):
    cfg, params = made(
        tiny, "model.positions=intervals", "model.positions.unit=2", "model.positions.scale=3"
    )
    tokens, tau = jnp.array([[3, 4, 5]]), jnp.array([[0.0, 2.0, 0.5]])
    context = models.default_context(tokens.shape)
    with pytest.raises(ConfigError, match="has intervals, and the context has none: give"):
        models.apply(cfg, params, tokens, context)
    context = context._replace(interval_BL=tau)
    spec = models.spec(cfg)
    got = decoder.embedded(spec, params, tokens, context, {})
    want = params["embedding"]["table"][tokens] + 3 * interval_embedding(tau / 2, 8)
    np.testing.assert_allclose(got, want, atol=1e-6)
    logits, _ = models.apply(cfg, params, tokens, context)
    other, _ = models.apply(cfg, params, tokens, context._replace(interval_BL=2 * tau))
    np.testing.assert_array_equal(other[:, 0], logits[:, 0])  # where the interval is 0
    assert np.abs(np.asarray(other - logits)[:, 1:]).max(-1).min() > 1e-4


def test_intervals_are_within_documents_and_exact_for_large_times():
    times = np.array([[1.7e9, 1.7e9 + 0.5, 1.7e9 + 3, 5.0, 9.0, 0.0]])
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    assert intervals(times, segments).tolist() == [[0, 0.5, 2.5, 0, 4, 0]]
    with pytest.raises(ValueError, match=r"time 2\.0 of row 0 follows 3\.0"):
        intervals(np.array([[3.0, 2.0]]), np.array([[1, 1]]))


def test_pace_is_relative_and_the_first_token_of_a_document_is_written():
    tau, segments = jnp.array([[0.0, 3.0, 0.0, 0.0, 6.0]]), jnp.array([[1, 1, 1, 2, 2]])
    assert pace(tau, segments, 2.0).tolist() == [[1, 1.5, 0, 1, 3]]
    assert pace(tau, segments, 2.0, least=0.25).tolist() == [[1, 1.5, 0.25, 1, 3]]
    with pytest.raises(ValueError, match="reference 0"):
        pace(tau, segments, 0)
    with pytest.raises(ValueError, match=r"intervals \(1, 4\) of segments \(1, 5\)"):
        pace(tau[:, 1:], segments, 2.0)


def test_pace_one_is_mamba_2(tiny):
    cfg, params = made(tiny)
    tokens = jax.random.randint(jax.random.key(1), (2, 5), 1, 20)
    context = models.default_context(tokens.shape)
    plain, _ = models.apply(cfg, params, tokens, context)
    even, _ = models.apply(cfg, params, tokens, context._replace(pace_BL=jnp.ones((2, 5))))
    np.testing.assert_array_equal(even, plain)
    odd, _ = models.apply(cfg, params, tokens, context._replace(pace_BL=2 * jnp.ones((2, 5))))
    assert np.abs(np.asarray(odd - plain)).max() > 1e-4


def test_an_interval_in_two_halves_is_the_interval(tiny):
    """With nothing written, the state decays by the time alone: the semigroup of the system."""
    cfg, params = made(tiny)
    mixer = params["layers"]["0"]["mixer"]
    silent = {**mixer, "conv_x": 0 * mixer["conv_x"], "conv_x_bias": 0 * mixer["conv_x_bias"]}
    layers = {"0": {**params["layers"]["0"], "mixer": silent}}
    start = models.apply(cfg, params, jnp.array([[3, 4, 5]]), state=models.init_state(cfg, 1, 8))[1]

    def after(*paces):
        tokens = jnp.full((1, len(paces)), 7)
        context = models.default_context(tokens.shape, 3)._replace(pace_BL=jnp.array([paces]))
        _, state = models.apply(cfg, {**params, "layers": layers}, tokens, context, start)
        return state.layers[0].memory

    whole = after(3.0)
    assert np.abs(np.asarray(whole - start.layers[0].memory)).max() > 1e-4
    np.testing.assert_allclose(after(1.5, 1.5), whole, rtol=1e-5)
    np.testing.assert_allclose(after(0.5, 2.0, 0.5), whole, rtol=1e-5)
    np.testing.assert_array_equal(after(0.0), start.layers[0].memory)


def test_steps_at_a_pace_are_the_row_at_it(tiny):
    cfg, params = made(tiny)
    tokens, paces = jnp.array([[3, 4, 5, 6]]), jnp.array([[1.0, 0.3, 2.0, 5.0]])
    context = models.default_context(tokens.shape)._replace(pace_BL=paces)
    whole, _ = models.apply(cfg, params, tokens, context)
    state = models.init_state(cfg, 1, 4)
    for n in range(4):
        one = jax.tree.map(lambda x, n=n: x[:, n : n + 1], context)
        step, state = models.apply(cfg, params, tokens[:, n : n + 1], one, state)
        np.testing.assert_allclose(step[:, 0], whole[:, n], atol=1e-5)


@pytest.mark.parametrize("mixer", ["attention", "rglru"])
def test_layers_that_do_not_follow_are_refused(tiny, mixer):
    cfg = tiny(*SIZES, f"model.pattern={mixer}", "model.vocab=20")
    params = decoder.init(models.spec(cfg), jax.random.key(0))
    context = models.default_context((1, 2))
    with pytest.raises(ConfigError, match=r"do not follow it: use mamba2"):
        models.apply(cfg, params, jnp.ones((1, 2), int), context._replace(pace_BL=jnp.ones((1, 2))))
    with pytest.raises(ValueError, match=r"pace \(1, 3\)"):
        models.apply(cfg, params, jnp.ones((1, 2), int), context._replace(pace_BL=jnp.ones((1, 3))))
