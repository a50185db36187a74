"""MLPs of experts, each token by itself in float64, and what is told of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import sigmoid, silu

from lcm import config, models
from lcm.errors import ConfigError
from lcm.nn.experts import Experts
from lcm.nn.functional import functional

KEYS = "model.mlp=experts", "model.hidden=24", "model.depth=1"
D, F, COUNT, TOP, SHARED = 32, 24, 5, 2, 12


@pytest.fixture
def layer(tiny):
    """A function from options to a layer's description and the two functions of its MLP."""

    def make(options: str):
        cfg = tiny(*KEYS, f"model.width={D}", f"model.mlp_options={options}")
        spec = models.spec(cfg).layers[0]
        return spec, functional(lambda rngs: Experts(spec, rngs))

    return make


def definition(p, x, normed):
    """Of one token `[D]`."""
    share = np.exp(x @ p["router"])
    share /= share.sum()
    chosen = np.argsort(-share)[:TOP]
    total = share[chosen].sum() if normed else 1
    y = np.zeros(D)
    for e in chosen:
        hidden = silu(x @ p["expert_gate"][e]) * (x @ p["expert_up"][e])
        y += share[e] / total * (hidden @ p["expert_down"][e])
    if "shared" in p:
        own = p["shared"]
        hidden = silu(x @ own["gate"]) * (x @ own["up"])
        y += (hidden @ own["down"]) * sigmoid(x @ p["shared_gate"])
    return y


@pytest.mark.parametrize("more", ["", ",normed=True,shared=12"])
def test_each_token_goes_through_its_experts(layer, more):
    _, mlp = layer(f"count={COUNT},top={TOP}{more}")
    params = jax.tree.map(np.float64, mlp.init(jax.random.key(0)))
    x = np.random.default_rng(0).standard_normal((2, 7, D))
    got = mlp.apply(jax.tree.map(jnp.float32, params), jnp.float32(x))
    want = [[definition(params, token, bool(more)) for token in row] for row in x]
    np.testing.assert_allclose(got, want, atol=1e-5)
    scores = (x @ params["router"]).reshape(-1, COUNT)
    assert len(set(np.argsort(-scores)[:, :TOP].ravel())) > TOP  # tokens differ in their experts


def test_sigmoids_whose_choice_a_bias_corrects(layer):
    """The bias decides who is chosen, not how much it counts (arXiv:2412.19437, eq. 12-16)."""
    options = "scores=sigmoid,corrected=True,normed=True,scale=2.5,shared=12,shared_gate=False"
    options += ",least=0.3"  # beside the sum
    spec, mlp = layer(f"count={COUNT},top={TOP},{options}")
    p = jax.tree.map(np.float64, mlp.init(jax.random.key(0)))
    random = np.random.default_rng(0)
    x, p["choice_bias"] = random.standard_normal((2, 7, D)), 0.5 * random.standard_normal(COUNT)
    got = mlp.apply(jax.tree.map(jnp.float32, p), jnp.float32(x))
    scores = sigmoid(x @ p["router"])
    chosen = np.argsort(-(scores + p["choice_bias"]))[..., :TOP]
    assert (chosen != np.argsort(-scores)[..., :TOP]).any()
    own = p["shared"]
    want = (silu(x @ own["gate"]) * (x @ own["up"])) @ own["down"]
    for at in np.ndindex(2, 7):
        total = scores[at][chosen[at]].sum() + 0.3
        for e in chosen[at]:
            hidden = silu(x[at] @ p["expert_gate"][e]) * (x[at] @ p["expert_up"][e])
            want[at] += 2.5 * scores[at][e] / total * (hidden @ p["expert_down"][e])
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert Experts.flops(spec) == 2 * D * (3 * (TOP * F + SHARED) + COUNT)


def test_the_load_of_sigmoids_is_of_their_shares(layer):
    """An expert's P is its part of a token's scores (arXiv:2412.19437, equation 19)."""
    _, mlp = layer(f"count={COUNT},top={TOP},scores=sigmoid,corrected=True")
    params = mlp.init(jax.random.key(0))
    params["choice_bias"] = jnp.arange(COUNT) * 10.0  # the last ones are always chosen
    x = jnp.float32(np.random.default_rng(0).standard_normal((1, 6, D)))
    _, load = mlp.apply(params, x, jnp.int32([[1, 1, 1, 1, 0, 0]]), method="told")
    scores = sigmoid(np.float64(x[0, :4]) @ np.float64(params["router"]))
    np.testing.assert_allclose(load.p_E, (scores / scores.sum(-1, keepdims=True)).sum(0), rtol=1e-5)
    assert load.chosen_E.tolist() == [0] * (COUNT - TOP) + [4] * TOP


def test_router_and_chosen_experts_learn(layer):
    _, mlp = layer(f"count={COUNT},top={TOP},shared={SHARED}")
    params = mlp.init(jax.random.key(0))
    x = jnp.float32(np.random.default_rng(0).standard_normal((1, 1, D)))
    gradient = jax.grad(lambda p: (mlp.apply(p, x) ** 2).sum())(params)
    used = np.abs(gradient["expert_down"]).max((1, 2)) > 0
    scores = np.asarray(x[0, 0] @ params["router"])
    np.testing.assert_array_equal(np.flatnonzero(used), np.sort(np.argsort(-scores)[:TOP]))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_flops_are_those_of_the_experts_that_are_used(layer):
    few, many = (layer(f"count={count},top={TOP}")[0] for count in (COUNT, 2 * COUNT))
    assert Experts.flops(few) == 2 * D * (3 * TOP * F + COUNT)
    assert Experts.flops(many) - Experts.flops(few) == 2 * D * COUNT  # of the router alone


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["model.mlp_options=top=9"], "top=9 chooses among count=8"),
        (["model.mlp_options=tops=2"], "this MLP has count, top, normed, shared, balance"),
        (["model.mlp_options=scores=tanh"], "scores=tanh is unknown: choose from softmax, sigmoid"),
        (["model.mlp_options=shared_gate=False"], "shared_gate=False with shared=0"),
        (["model.mlp_options=scale=0"], "scale=0.0 must lie from"),
        (["model.mlp_options=count=0"], "count=0 must lie from 1"),
        (["model.biases=mlp"], "biases=mlp gives an MLP biases"),
        (["model.mlp=swiglu", "model.mlp_options=top=2"], "this MLP has none"),
    ],
)
def test_what_cannot_be_is_refused(tiny, keys, said):
    with pytest.raises(ConfigError, match=said):
        models.spec(config.override(tiny(*KEYS), keys))
