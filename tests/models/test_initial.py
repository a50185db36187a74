"""States from outside: what is passed on, fitted, drawn and held in bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import config, models
from lcm.models import initial

MIXERS = {
    "mamba2": [],
    "rglru": ["model.expand=1"],
    "gated_deltanet": [],
    "mlstm": [],
    "hybrid": ["model.pattern=mamba2,attention"],
}


@pytest.fixture(params=MIXERS, scope="module")
def ran(request):
    """A model, its parameters, two rows of tokens, and the state after the first half."""
    name = request.param
    mixer = [] if name == "hybrid" else [f"model.mixer={name}", f"model.pattern={name}"]
    cfg = config.override(config.shrink(config.base()), [*mixer, *MIXERS[name]])
    params, row = (
        models.init(cfg, jax.random.key(0)),
        jax.random.randint(jax.random.key(1), (2, 24), 0, 256),
    )
    _, state = models.apply(cfg, params, row[:, :12], state=models.init_state(cfg, 2, 24))
    return cfg, params, row, state


@pytest.mark.quick("mamba2")
def test_a_passed_state_goes_on_and_has_no_gradient(ran):
    cfg, params, row, state = ran
    want, _ = models.apply(cfg, params, row)
    got, _ = models.apply(cfg, params, row[:, 12:], state=initial.passed(state))
    np.testing.assert_allclose(got, want[:, 12:], atol=2e-5)

    def loss(scale, detach):
        first = {**params, "embedding": jax.tree.map(lambda x: scale * x, params["embedding"])}
        _, state = models.apply(cfg, first, row[:, :12], state=models.init_state(cfg, 2, 24))
        state = initial.passed(state) if detach else state
        return models.apply(cfg, params, row[:, 12:], state=state)[0].var()

    assert jax.grad(loss)(1.1, True) == 0
    assert jax.grad(loss)(1.1, False) != 0


@pytest.mark.quick("hybrid")
def test_drawn_states_have_the_moments_of_fitted_ones(ran):
    cfg, _, _, state = ran
    fit = initial.fitted(state)
    many = models.init_state(cfg, 4096, 1)
    drawn = initial.drawn(jax.random.key(3), fit, many)
    again = initial.fitted(drawn)
    for want, got, spread in zip(
        *map(jax.tree.leaves, (fit.mean, again.mean, fit.std)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=float(5 * spread.max() / 64) + 1e-6)
    for want, got in zip(*map(jax.tree.leaves, (fit.std, again.std)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0.06, atol=1e-6)
    kept = [x for x in drawn.layers if hasattr(x, "segment_B")]
    assert all((x.segment_B == 1).all() for x in kept)  # so that tokens go on from them


@pytest.mark.quick("mamba2", "hybrid")
def test_norms_are_bounded_and_bounds_that_do_not_bind_change_nothing(ran):
    *_, state = ran
    norms = initial.norms(state)
    free = initial.normalised(state, jax.tree.map(lambda x: x * 1.001, norms))
    jax.tree.map(np.testing.assert_array_equal, free, state)
    half = initial.normalised(state, jax.tree.map(lambda x: x / 2, norms))
    for got, want in zip(*map(jax.tree.leaves, (initial.norms(half), norms)), strict=True):
        np.testing.assert_allclose(got, want / 2, rtol=1e-5)
    flat = jax.tree.map(lambda x: jnp.float32(0.01), norms)
    for got in jax.tree.leaves(initial.norms(initial.normalised(state, flat))):
        assert (got <= 0.01 * (1 + 1e-6)).all()
