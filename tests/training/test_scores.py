"""The loss in pieces against that of all tokens at once, and the gradients made with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import config, models
from lcm.models import decoder
from lcm.training import scores

VOCAB, WIDTH, SHAPE = 48, 16, (2, 12)


@pytest.fixture(params=["head", "tied", "capped"])
def given(request):
    keys = [f"model.width={WIDTH}", "model.depth=1", "model.heads=2", f"model.vocab={VOCAB}"]
    keys += ["data.length=12", f"model.tied={request.param == 'tied'}"]
    keys += ["model.logit_cap=2.0", "model.logit_divisor=2"] if request.param == "capped" else []
    spec = models.spec(config.override(config.base(), keys))
    draw = np.random.default_rng(0)
    params = decoder.init(spec, jax.random.key(0))
    x_BLD = jnp.asarray(draw.normal(size=(*SHAPE, WIDTH)), jnp.float32)
    targets_BL = jnp.asarray(draw.integers(0, VOCAB, SHAPE))
    weight_BL = jnp.asarray(draw.integers(0, 3, SHAPE), jnp.float32)
    return spec, params, x_BLD, targets_BL, weight_BL


def losses(spec, z_loss, params, x_BLD, targets_BL, weight_BL):
    total, nll_BL = scores.scored(spec, z_loss, params, x_BLD, targets_BL, weight_BL)
    return 3 * total, nll_BL


@pytest.mark.parametrize(("z_loss", "held"), [(0.0, 12), (0.1, 24)])
def test_pieces_have_the_loss_and_the_gradients_of_the_whole(given, monkeypatch, z_loss, held):
    spec, *args = given
    run = jax.value_and_grad(losses, (2, 3, 5), has_aux=True)
    want = run(spec, z_loss, *args)
    monkeypatch.setattr(scores, "LOGITS", 5 * VOCAB)
    monkeypatch.setattr(scores, "HELD", held * VOCAB)
    assert "custom_vjp" in str(jax.make_jaxpr(lambda *a: losses(spec, z_loss, *a))(*args))
    got = run(spec, z_loss, *args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)
    np.testing.assert_allclose(losses(spec, z_loss, *args)[0], want[0][0], rtol=1e-5)


def test_logits_are_made_once_for_a_loss_and_its_gradients(given, monkeypatch):
    spec, params, x_BLD, targets_BL, weight_BL = given
    monkeypatch.setattr(scores, "LOGITS", 5 * VOCAB)
    monkeypatch.setattr(scores, "HELD", 8 * VOCAB)

    def loss(params, x_BLD):
        return scores.scored(spec, 0.1, params, x_BLD, targets_BL, weight_BL)[0]

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x_BLD))
    assert text.count("dot_general") == 3  # logits, and the gradients of both factors
    assert f"24,{VOCAB}]" not in text and f"12,{VOCAB}]" not in text
