"""Attention's statistics, receptive fields and positional heads, against closed forms and loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import evaluation, models, positions
from lcm.errors import ConfigError
from lcm.evaluation import attention, heads, receptive_field
from lcm.ops.attention import Part, causal
from lcm.types import Batch, Context

LENGTH = 32


def context(length: int = LENGTH) -> Context:
    return models.default_context((1, length))


def part(seed: int = 0, length: int = LENGTH, size: int = 8) -> Part:
    q, k = (jax.random.normal(jax.random.key(seed + i), (1, length, 2, size)) for i in (0, 1))
    return Part(q, k, causal())


def test_entropy_and_largest_are_those_of_the_weights():
    p = np.asarray(attention.weights((part(),), context()))[0]
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
    want = [[-sum(x * np.log(x) for x in row if x > 0) for row in head] for head in p]
    np.testing.assert_allclose(attention.entropy((part(),), context())[0], want, atol=1e-5)
    np.testing.assert_allclose(attention.largest((part(),), context())[0], p.max(-1))


def test_entropy_falls_with_the_factor_and_is_the_log_of_keys_at_zero():
    by_factor = []
    for factor in (0.0, 0.5, 1.0, 2.0, 4.0):
        scaled = Part(part().q_BLHK * factor, part().k_BSGK, causal())
        by_factor.append(np.asarray(attention.entropy((scaled,), context())))
    np.testing.assert_allclose(
        by_factor[0], np.broadcast_to(np.log(np.arange(1, 33)), (1, 2, 32)), atol=1e-5
    )
    assert np.all(np.diff(by_factor, axis=0) <= 1e-6)


@pytest.mark.slow
def test_aligned_temperature_of_a_model_is_found_and_falls_with_length(tiny):
    cfg = tiny("model.positions=t5")
    params = models.init(cfg, jax.random.key(0))
    tall = jax.tree.map(lambda x: 4 * x, params["layers"]["0"]["mixer"])  # sharper attention
    params["layers"]["0"]["mixer"] = tall
    tokens = jax.random.randint(jax.random.key(1), (2, 256), 0, 256)
    for statistic in ("entropy", "largest"):
        found = [
            evaluation.align_temperature(cfg, params, tokens[:, :32], tokens[:, :n], statistic)
            for n in (32, 64, 256)
        ]
        assert found[0] == 1.0 and 1.0 > found[1] > found[2] > attention.COLDEST
    with pytest.raises(ConfigError, match="'median' is unknown: choose from entropy, largest"):
        evaluation.align_temperature(cfg, params, tokens, tokens, "median")


def test_gaussian_scores_align_as_the_card_measured():
    """512 keys at sigma 1: 0.643 at twice as many (closed form 0.647), 0.432 at eight times."""
    np.testing.assert_allclose(evaluation.gaussian_temperature(1.0, 2), 0.647, atol=5e-4)
    np.testing.assert_allclose(evaluation.gaussian_temperature(1.0, 8), 0.440, atol=5e-4)

    def entropy(keys: int, temperature: float) -> float:
        rows = np.random.default_rng(0).normal(size=(400, keys)) / temperature
        p = np.exp(rows - rows.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        return float(-(p * np.log(p)).sum(1).mean())

    for keys, published in ((1024, 0.643), (4096, 0.432)):
        below, above = (entropy(keys, published + d) for d in (-0.02, 0.02))
        assert below < entropy(512, 1.0) < above


@pytest.mark.parametrize(
    "name, expected",
    [
        ("alibi", {0.1: [5, 590], 0.01: [10, 1179], 0.001: [14, 1769]}),
        ("type_one", {0.1: [6] * 2, 0.01: [61] * 2, 0.001: [608] * 2}),
        ("type_two", {0.1: [4] * 2, 0.01: [9] * 2, 0.001: [15] * 2}),
    ],
)
def test_theoretical_receptive_fields_of_the_card(name, expected):
    """Heads of slope 1/2 and 1/256 for ALiBi; the card's sums, to 1e7 terms."""
    encoding = positions.make({"name": name})
    count = 8 if name == "alibi" else 2
    weights = evaluation.bias_weights(encoding, {}, count)[[0, -1]]
    for eps, want in expected.items():
        np.testing.assert_array_equal(evaluation.theoretical_receptive_field(weights, eps), want)


def test_sums_that_diverge_have_no_field():
    assert np.all(np.isinf(evaluation.theoretical_receptive_field(np.ones((2, 4096)), 0.01)))
    kerple = positions.Kerple()
    slow = {"p": jnp.asarray([0.5, 3.0]), "a": jnp.ones(2)}
    field = evaluation.theoretical_receptive_field(
        evaluation.bias_weights(kerple, slow, 2, 1 << 16), 0.01
    )
    assert np.isinf(field[0]) and field[1] < 100
    with pytest.raises(ConfigError, match="RoPE adds no bias"):
        evaluation.bias_weights(positions.RoPE(), {}, 2)


def test_empirical_field_is_the_window_of_a_model_that_has_one(tiny):
    cfg = tiny("model.positions=alibi", "model.window=6", "model.depth=1")
    params = models.init(cfg, jax.random.key(0))
    params["layers"]["0"]["mixer"]["v"] *= 20.0  # so that each key counts
    row = jax.random.randint(jax.random.key(1), (4, LENGTH + 1), 0, 256)
    where = models.default_context((4, LENGTH))
    batch = Batch(row[:, :-1], row[:, 1:], where, jnp.ones((4, LENGTH)))
    assert evaluation.empirical_receptive_field(cfg, params, batch, 1e-3) == 6
    assert evaluation.empirical_receptive_field(cfg, params, batch, 1e9) == 1


def test_far_contributions_are_those_of_loops():
    p, size, distance = part(3, 20), 8, 9
    got = heads.far_contributions((p,), context(20), rotated=size, distance=distance)
    a = np.asarray(attention.weights((p,), context(20)))[0]
    q, k = (np.asarray(x)[0].transpose(1, 0, 2) for x in (p.q_BLHK, p.k_BSGK))
    for h in range(2):
        rows = []
        for m in range(20):
            c = q[h, m, :4] * k[h, :, :4] + q[h, m, 4:] * k[h, :, 4:]
            far = [n for n in range(heads.SINKS, m + 1) if m - n >= distance]
            if far:
                mean = sum(a[h, m, n] * c[n] for n in far) / sum(a[h, m, n] for n in far)
                rows.append(mean - c[: m + 1].mean(0))
        np.testing.assert_allclose(got[h], np.mean(rows, 0), atol=1e-5)


def test_a_head_of_one_pair_has_that_pair_alone(tiny):
    p = part(4)
    only = jnp.zeros(8).at[jnp.array([2, 6])].set(1.0)
    one = Part(p.q_BLHK * only, p.k_BSGK, causal())
    far = np.asarray(heads.far_contributions((one,), context(), rotated=8, distance=8))
    assert np.all(far[:, [0, 1, 3]] == 0) and np.all(far[:, 2] != 0)


def test_positional_heads_of_a_model_and_their_removal(tiny):
    cfg = tiny("model.positions=rope", "model.depth=2", "model.heads=4", "model.kv_heads=2")
    params = models.init(cfg, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, 256)
    found = evaluation.positional_heads(cfg, params, tokens)
    assert found.score.shape == (2, 4) and found.far.shape == (2, 4, 4)
    assert np.all(np.abs(found.score) <= 1) and np.all(
        (found.allocation >= 0) & (found.allocation <= 1)
    )
    best = found.top(0.25)
    assert len(best) == 2 and found.score[best[0]] == found.score.max()
    less = evaluation.without_heads(cfg, params, best)
    changed = less["layers"]["0"]["mixer"]["out"] != params["layers"]["0"]["mixer"]["out"]
    assert {(n, row // 8) for n, row in np.argwhere(np.asarray(changed).any(-1)).tolist()} == set(
        best
    )
    alibi = tiny("model.positions=alibi")
    with pytest.raises(ConfigError, match="ALiBi does not rotate"):
        evaluation.positional_heads(alibi, models.init(alibi, jax.random.key(0)), tokens)


def test_entropy_by_position_of_a_model(tiny):
    cfg = tiny("model.positions=nope", "model.depth=3")
    params = models.init(cfg, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, 256)
    found = evaluation.statistic_by_position(cfg, params, tokens, "entropy")
    assert found.shape == (3, LENGTH) and np.all(found[:, 0] == 0)
    assert np.all(found <= np.log(np.arange(1, LENGTH + 1)) + 1e-5)
    assert receptive_field.DISTANCES >= 1 << 20


@pytest.mark.parametrize("name", ["head_scale+nope", "countdown+rope", "aligned+alibi"])
def test_chains_that_learn_have_an_empirical_field(name, tiny):
    """Their parameters stay theirs below the window that a test adds."""
    cfg = tiny(f"model.positions={name}", "model.window=6", "model.depth=1")
    params = models.init(cfg, jax.random.key(0))
    params["layers"]["0"]["mixer"]["v"] *= 20.0
    row = jax.random.randint(jax.random.key(1), (4, LENGTH + 1), 0, 256)
    where = models.default_context((4, LENGTH))
    batch = Batch(row[:, :-1], row[:, 1:], where, jnp.ones((4, LENGTH)))
    assert evaluation.empirical_receptive_field(cfg, params, batch, 1e-3) == 6


def test_statistics_of_attention_that_is_not_its_parts_are_refused(tiny):
    cfg = tiny("model.positions=log_n+cope")
    params = models.init(cfg, jax.random.key(0))
    with pytest.raises(ConfigError, match="CoPE reads scores or chooses keys"):
        evaluation.statistic_by_position(cfg, params, jnp.zeros((1, 8), jnp.int32), "entropy")
