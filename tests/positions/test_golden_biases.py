"""Biases against published values, and CoPE against its own definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import arrays, attended, context

from lcm import positions
from lcm.positions import alibi

DIMS = positions.Dims(width=32, heads=4, kv_heads=4, head_size=8, length=16)


def bias(encoding, params, i, j, heads=4):
    """`[H, ...]` of what is added to a score of 0."""
    i, j = jnp.broadcast_arrays(jnp.asarray(i, jnp.int32), jnp.asarray(j, jnp.int32))
    head = jnp.arange(heads).reshape(heads, *[1] * i.ndim)

    @jax.jit
    def added(params, i, j):
        return encoding.score_mod(params, heads)(jnp.zeros((heads, *i.shape)), i, j, head)

    return np.asarray(added(params, i, j))


def of_distance(encoding, params, distances, heads=4):
    return bias(encoding, params, np.asarray(distances), 0, heads)


# Buckets


def test_t5_buckets_of_the_card():
    distances = [0, 15, 16, 17, 20, 23, 32, 64, 100, 113, 128, 1000]
    numbers = {"table": jnp.arange(32.0)[:, None]}
    found = of_distance(positions.T5(), numbers, distances, heads=1)[0]
    np.testing.assert_array_equal(found, [0, 15, 16, 16, 17, 18, 21, 26, 30, 31, 31, 31])


def test_t5_buckets_everywhere():
    """The formula in float64 wherever it is not at a whole number, and growth by at most one."""
    n = np.arange(1, 3000)
    numbers = {"table": jnp.arange(32.0)[:, None]}
    found = of_distance(positions.T5(), numbers, n, heads=1)[0]
    exact = 16 + np.log(n / 16) / np.log(8) * 16
    clear = np.abs(exact - np.round(exact)) > 1e-6
    want = np.where(n < 16, n, np.minimum(np.floor(exact), 31))
    np.testing.assert_array_equal(found[clear], want[clear])
    assert found[31] == 21 and found[63] == 26  # exact powers, where float32 logarithms waver
    assert set(np.diff(found)) == {0, 1}
    assert np.all(found[112:] == 31) and found[111] == 30


# Linear


def test_alibi_as_slope_times_key_is_the_same_after_softmax():
    i, j = np.arange(9)[:, None], np.arange(9)
    (part,) = positions.ALiBi().parts({}, *(jnp.zeros((1, 9, 4, 8)),) * 2, *(context(9),) * 2)
    slopes = np.asarray(part.score_mod.slopes_H)
    np.testing.assert_allclose(slopes, alibi.slopes(4))
    found = np.stack([part.score_mod(jnp.zeros((9, 9)), i, j, h) for h in range(4)])
    by_key = slopes[:, None, None] * j
    seen = j <= i
    soft = [np.exp(np.where(seen, b, -np.inf)) for b in (found, by_key)]
    a, b = (s / s.sum(-1, keepdims=True) for s in soft)
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_slopes_of_bloom_and_mpt():
    """Heads that are no power of two: 40 of BLOOM-7B's kind, all different, all below 1."""
    slopes = alibi.slopes(40)
    np.testing.assert_allclose(slopes[:32], [2 ** (-h / 4) for h in range(1, 33)])
    np.testing.assert_allclose(slopes[32:], [2 ** (-(2 * h - 1) / 8) for h in range(1, 9)])
    assert len(set(slopes)) == 40


def test_hard_alibi_shows_h_plus_one_keys():
    found = of_distance(positions.HardALiBi(local=2), {}, range(5))
    np.testing.assert_array_equal(np.isfinite(found).sum(1), [1, 2, 5, 5])


# KERPLE


def test_kerple_begins_within_its_ranges():
    many = positions.Dims(width=8, heads=4000, kv_heads=1, head_size=8, length=8)
    params = positions.Kerple().init_layer(jax.random.key(0), many)
    for name, most in (("p", 2.0), ("a", 1.0)):
        x = np.asarray(params[name])
        assert 0.01 <= x.min() < 0.02 and 0.99 * most < x.max() < most
        assert x.mean() == pytest.approx(most / 2, rel=0.03)


def test_kerple_values_and_shape():
    params = {"p": jnp.asarray([0.5, 1.0, 1.5, 2.0]), "a": jnp.asarray([0.1, 0.2, 0.5, 1.0])}
    n = np.arange(200)
    log = of_distance(positions.Kerple(), params, n)
    power = of_distance(positions.KerplePower(), params, n)
    p, a = (np.asarray(params[name])[:, None] for name in "pa")
    np.testing.assert_allclose(log, -p * np.log(1 + a * n), rtol=1e-5)
    np.testing.assert_allclose(power, -a * n**p, rtol=1e-5)
    for found in (log, power):
        assert np.all(found[:, 0] == 0) and np.all(np.diff(found) < 0)
    np.testing.assert_allclose(power[1], -0.2 * n, rtol=1e-5)  # p = 1 is ALiBi


def test_kerple_stays_within_its_limits():
    params = {"p": jnp.asarray([-1.0, 3.0]), "a": jnp.asarray([0.0, 5.0])}
    log, power = positions.Kerple().project(params), positions.KerplePower().project(params)
    least = float(np.float32(0.01))
    assert log["p"].tolist() == [least, 3.0] and log["a"].tolist() == [least, 5.0]
    assert power["p"].tolist() == [least, 2.0] and power["a"].tolist() == [least, 5.0]


def test_kerple_power_has_a_gradient_at_distance_zero():
    encoding = positions.KerplePower()
    params = {"p": jnp.full(1, 0.5), "a": jnp.ones(1)}

    def total(params):
        mod = encoding.score_mod(params, 1)
        return mod(jnp.zeros(3), jnp.arange(3), jnp.zeros(3, jnp.int32), 0).sum()

    gradient = jax.grad(total)(params)
    assert gradient["a"][0] == pytest.approx(-1 - 2**0.5, rel=1e-6)
    assert gradient["p"][0] == pytest.approx(-(2**0.5) * np.log(2), rel=1e-6)


# Sandwich, Type 1 and 2


def test_sandwich_values_of_the_card():
    """The card sums from k = 0, its method and ours from 1 to D/2: the ends differ."""
    n = np.array([0, 1, 10, 100])
    heads = np.arange(1, 5)[:, None]
    total = of_distance(positions.Sandwich(), {}, n) * 8 * heads / 4
    from_zero = total + np.cos(n) - np.cos(n / 10_000)
    np.testing.assert_allclose(
        from_zero, np.tile([64, 62.0937, 42.8200, 30.5434], (4, 1)), rtol=2e-6
    )


def test_weights_of_type_one_and_two_have_the_published_sums():
    n = np.arange(1_000_000)
    one = np.exp(of_distance(positions.TypeOne(), {}, n, heads=1)[0].astype(np.float64))
    two = np.exp(of_distance(positions.TypeTwo(), {}, n, heads=1)[0].astype(np.float64))
    assert one.sum() == pytest.approx(np.pi**2 / 6, abs=2e-6)  # the tail beyond is 1e-6
    assert two.sum() == pytest.approx(2.23818, abs=5e-6)


# FIRE


def fire(heads=1, **values):
    """Parameters of a network that hands its input on: the bias is x."""
    one = jnp.ones(1)
    return {
        "c": jnp.asarray(values.get("c", 0.1)),
        "multiplier": jnp.asarray(values.get("multiplier", 1.0)),
        "inner": one,
        "inner_bias": 0 * one,
        "outer": jnp.ones((1, heads)),
        "outer_bias": jnp.zeros(heads),
    }


def test_fire_input():
    encoding, i = positions.Fire(hidden=1, threshold=64.0), np.arange(200)[:, None]
    j = np.arange(200)
    x = bias(encoding, fire(), i, j, heads=1)[0]
    seen = j <= i
    assert x[seen].min() == 0 and x[seen].max() <= 1
    assert np.all(np.diagonal(x) == 0)
    assert np.all(np.diff(x, axis=1)[seen[:, 1:]] < 0)  # the nearer the key, the smaller
    short = x[np.arange(10, 65), np.arange(0, 55)]
    np.testing.assert_allclose(short, short[0], rtol=1e-6)  # up to L distances alone
    long = x[np.arange(65, 200), np.arange(55, 190)]
    assert np.all(np.diff(long) < 0)  # beyond it rows differ
    want = np.log(0.1 * 10 + 1) / (np.log(0.1 * 64 + 1) + 1e-6)
    assert short[0] == pytest.approx(want, rel=1e-5)


def test_fire_does_not_know_the_unit_of_positions():
    i, j = np.arange(0, 100, 3)[:, None], np.arange(0, 100, 7)
    seen = j <= i
    plain = bias(positions.Fire(hidden=1, threshold=32.0), fire(c=0.1), i, j, 1)[0]
    finer = bias(positions.Fire(hidden=1, threshold=160.0), fire(c=0.02), 5 * i, 5 * j, 1)[0]
    np.testing.assert_allclose(plain[seen], finer[seen], rtol=1e-5)


def test_fire_takes_c_and_threshold_without_their_signs():
    i, j = np.arange(100)[:, None], np.arange(100)
    encoding = positions.Fire(hidden=1, threshold=32.0)
    signs = fire(c=-0.1, multiplier=-1.0)
    np.testing.assert_array_equal(
        bias(encoding, signs, i, j, 1)[0], bias(encoding, fire(), i, j, 1)[0]
    )


def test_heads_of_fire_are_columns_of_its_last_layer():
    encoding = positions.Fire()
    params = encoding.init_layer(jax.random.key(0), DIMS)
    order = np.array([2, 0, 3, 1])
    mixed = {
        **params,
        "outer": params["outer"][:, order],
        "outer_bias": params["outer_bias"][order],
    }
    n = np.arange(50)
    np.testing.assert_array_equal(
        of_distance(encoding, mixed, n), of_distance(encoding, params, n)[order]
    )
    assert params["inner"].shape == (32,) and float(params["c"]) == pytest.approx(0.1)


# CoPE


@jax.jit
def cope(table, q, k, v):
    encoding = positions.CoPE(positions=6)
    return attended(encoding, {"table": table}, q, k, v, context())


def dense_cope(q, k, v, table):
    """By its definition, pair by pair in float64; one head."""
    n, size = q.shape
    out = np.zeros((n, size))
    for i in range(n):
        s = k[: i + 1] @ q[i] / size**0.5
        gates = 1 / (1 + np.exp(-s))
        p = np.minimum(np.cumsum(gates[::-1])[::-1], len(table) - 1)
        z = table @ q[i]
        low, high = np.floor(p).astype(int), np.ceil(p).astype(int)
        s = s + (p - low) * z[high] + (1 - p + low) * z[low]
        weight = np.exp(s - s.max())
        out[i] = weight @ v[: i + 1] / weight.sum()
    return out


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_cope_by_its_definition(scale):
    """Without a table it is NoPE."""
    q, k, v = arrays()
    table = scale * jax.random.normal(jax.random.key(4), (6, 8))
    found = cope(table, q, k, v)
    for head in range(2):  # which share one key head
        rows = [np.asarray(x[0, :, min(head, x.shape[2] - 1)], np.float64) for x in (q, k, v)]
        want = dense_cope(*rows, np.asarray(table, np.float64))
        np.testing.assert_allclose(found[0, :, head], want, atol=2e-5)


def test_cope_with_open_gates_counts_tokens():
    """Gates of 1 give position i - j + 1, held to P - 1."""
    n, p = 24, 6
    q = jnp.zeros((1, n, 2, 8)).at[..., 0].set(300.0)
    k = jnp.zeros((1, n, 1, 8)).at[..., 0].set(1.0)  # scores of 106: sigmoid is 1 in float32
    table = jnp.zeros((p, 8)).at[:, 0].set(jnp.arange(p) ** 2 / 300.0)
    v = jnp.tile(jnp.eye(8), (3, 1))[None, :, None]
    found = cope(table, q, k, v)
    i, j = np.arange(n)[:, None], np.arange(n)
    score = np.where(j <= i, np.minimum(i - j + 1, p - 1) ** 2.0, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    np.testing.assert_allclose(found[0, :, 1], weight @ v[0, :, 0], atol=2e-5)
