"""The loss that balances experts: what a step makes of it, and what training makes of the load."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import packed_batch, run

from lcm import config, models, training
from lcm.errors import ConfigError
from lcm.models import decoder
from lcm.nn.experts import Experts, Load, imbalance, largest_share
from lcm.training.scores import scored

BALANCE, COUNT = 5.0, 6
EXPERTS = ("model.mlp=experts", "model.hidden=16", "train.warmup=0")
# Two kinds of layers of experts, a round of them in the loop and half of one behind it.
MIXED = (
    *("model.depth=3", "model.unroll=1", "model.pattern=('first', 'many')"),
    *("model.kinds.first.window=8", "model.kinds.many.mlp=experts"),
)


def options(balance: float = BALANCE, top: int = 2) -> str:
    return f"model.mlp_options=count={COUNT},top={top},balance={balance}"


def load(cfg, params, batch) -> Load:
    read = params, batch.tokens_BL, batch.context, None
    return decoder.hidden_and_load(models.spec(cfg), *read)[2]


def test_even_and_uneven_loads():
    """With k choices k if they are even, E where all tokens choose one expert for certain."""
    even = Load(jnp.full((2, 4), 6.0), jnp.full((2, 4), 3.0), jnp.full(2, 12.0))
    assert float(imbalance(even)) == 2 and float(largest_share(even.chosen_E)) == 0.25
    one = jnp.zeros((1, 4)).at[0, 1].set(12.0)
    assert float(imbalance(Load(one, one, jnp.full(1, 12.0)))) == 4
    # Each layer has an expert of its own: even together, as the share of the largest tells.
    apart = jnp.diag(jnp.full(4, 12.0))
    assert float(imbalance(Load(apart, apart, jnp.full(4, 12.0)))) == 1
    assert float(largest_share(apart)) == 1
    nothing = jnp.zeros((1, 4))
    assert float(imbalance(Load(nothing, nothing, jnp.zeros(1)))) == 0


def test_a_step_follows_both_gradients(tiny):
    """Of the mean loss and of the imbalance of the tokens that are there, padding left out."""
    keys = *EXPERTS, *MIXED, "train.z_loss=0"
    cfg, batch = tiny(*keys, "model.remat=full", options()), packed_batch()
    spec, params = models.spec(cfg), models.init(cfg, jax.random.key(cfg.seed))
    plain = models.spec(tiny(*keys, options(0)))

    def loss(params, balance):
        read, weight_BL = (params, batch.tokens_BL, batch.context, None), batch.loss_weight_BL
        x_BLD, _, own = decoder.hidden_and_load(plain, *read)
        total, _ = scored(plain, 0.0, params, x_BLD, batch.targets_BL, weight_BL)
        return total / weight_BL.sum() + balance * imbalance(own), own

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    (without, own), (both, _) = gradient(params, 0.0), gradient(params, BALANCE)
    there = float((batch.context.segments_BL > 0).sum())
    assert own.tokens.tolist() == [there] * 3 and there < batch.tokens_BL.size
    np.testing.assert_allclose(own.chosen_E.sum(1), 2 * there)
    np.testing.assert_allclose(own.p_E.sum(1), there, rtol=1e-5)
    _, metrics = run(cfg, batch)
    assert float(metrics["imbalance"]) == pytest.approx(float(imbalance(own)), rel=1e-5)
    assert float(metrics["largest_share"]) == pytest.approx(float(largest_share(own.chosen_E)))
    norm = float(optax.tree.norm(both))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    assert abs(norm / float(optax.tree.norm(without)) - 1) > 1e-2
    assert spec.balance == BALANCE and plain.balance == 0


def test_without_it_a_step_is_as_it_was(tiny, monkeypatch):
    cfg = tiny(*EXPERTS, "model.mlp_options=top=2")
    monkeypatch.delattr(Experts, "told")
    metrics = jax.eval_shape(lambda: run(cfg, packed_batch())[1])
    assert metrics.keys() == {"loss", "tokens", "grad_norm", "loss_by_position"}


def test_imbalance_pulls_at_routers_and_at_nothing_behind_the_last(tiny):
    cfg, batch = tiny(*EXPERTS, options()), packed_batch()
    params = models.init(cfg, jax.random.key(0))
    pulled = jax.jit(jax.grad(lambda p: imbalance(load(cfg, p, batch))))(params)
    pulled = pulled["layers"]["0"]["mlp"]
    size = {name: np.abs(leaf).max((1, 2)) for name, leaf in pulled.items() if name == "router"}
    assert (size["router"] > 1e-4).all()
    assert np.abs(pulled["expert_down"][0]).max() > 0  # the router of the next layer reads it
    assert np.abs(pulled["expert_down"][1]).max() == 0


def test_microbatches_are_balanced_each_by_itself(tiny):
    batch, parts = packed_batch(), 2
    cfg = tiny(*EXPERTS, options(), f"train.accumulate={parts}")
    state, metrics = run(cfg, batch)
    params = models.init(cfg, jax.random.key(cfg.seed))
    micro = [jax.tree.map(lambda x, n=n: x[n::parts], batch) for n in range(parts)]
    weights = [float(part.loss_weight_BL.sum()) for part in micro]
    own = [load(cfg, params, part) for part in micro]
    want = np.average([float(imbalance(each)) for each in own], weights=weights)
    assert float(metrics["imbalance"]) == pytest.approx(want, rel=1e-5)
    whole = load(cfg, params, batch).chosen_E
    assert float(metrics["largest_share"]) == pytest.approx(float(largest_share(whole)))
    assert abs(weights[0] - weights[1]) > 1 and np.isfinite(jax.tree.leaves(state.params)[0]).all()


def test_a_run_tells_both(tiny, tmp_path):
    keys = "train.steps=2", "train.log_every=1", "model.depth=1"
    training.train(tiny(*EXPERTS, options(), *keys), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert 1.5 < line["imbalance"] < COUNT and 1 / COUNT < line["largest_share"] < 1


def frequent(step: int):
    """A batch of words of which few are frequent, each followed by a function of its own."""
    u = jax.random.uniform(jax.random.key(step), (8, 32))
    tokens = jnp.int32(jnp.exp(5.5 * u))
    return packed_batch()._replace(tokens_BL=tokens, targets_BL=(3 * tokens + 1) % 256)


@pytest.mark.slow
def test_training_with_it_leaves_a_collapse(tiny):
    """All tokens begin with one expert, since what they have in common is for it."""
    shares, uneven = {}, {}
    for balance in (0.0, 0.1):
        keys = "model.depth=1", "train.lr=0.01", "train.schedule=constant"
        cfg = tiny(*EXPERTS, *keys, options(balance, top=1))
        spec, rule = models.spec(cfg), training.optimizer(cfg.train)
        state = training.init_state(spec, rule, jax.random.key(0), 0.0)
        state.params["embedding"]["table"] += 1.0
        mlp = state.params["layers"]["0"]["mlp"]
        mlp["router"] = mlp["router"].at[..., 0].add(0.1)
        assert float(largest_share(load(cfg, state.params, frequent(0)).chosen_E)) == 1
        step = jax.jit(training.make_step(spec, rule, cfg))
        for n in range(20):
            state, _ = step(state, frequent(n))
        own = load(cfg, state.params, frequent(1000))
        shares[balance] = float(largest_share(own.chosen_E))
        uneven[balance] = float(imbalance(own))
    assert shares[0.0] > 0.9 and shares[0.1] < 0.5
    assert uneven[0.0] > 2 and uneven[0.1] < 1.2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["model.mlp=swiglu", "model.mlp_options=balance=0.1"], "'balance' is unknown.*has none"),
        (["model.mlp_options=balance=-0.1"], r"balance=-0.1 must lie from 0.0 to"),
        (["model.mlp_options=balance=much"], "balance is a float"),
        (
            [*MIXED, options(), "model.kinds.many.mlp_options=count=6,balance=0.1"],
            "balance=5.0 in one kind of layer and 0.1 in another",
        ),
        (
            [*MIXED, options(), f"model.kinds.many.mlp_options=count=8,balance={BALANCE}"],
            "count=6 in one kind of layer and 8 in another",
        ),
    ],
)
def test_what_cannot_be_balanced_is_refused(tiny, keys, said):
    with pytest.raises(ConfigError, match=said):
        models.spec(config.override(tiny(*EXPERTS), keys))
