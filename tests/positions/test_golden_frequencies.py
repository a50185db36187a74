"""Frequencies against published values and identities between methods."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import positions
from lcm.types import Context


def theta(encoding, size=128, length=0, params=None):
    """float32: what depends on a length or on parameters has no more."""
    return np.asarray(encoding.frequencies(size, jnp.asarray(length), params)[0], np.float32)


def amplitude(encoding, size=128):
    return float(encoding.frequencies(size)[1])


def at(*numbers):
    return jnp.asarray([numbers], jnp.int32)


# RoPE


def test_rotation_keeps_norms_and_knows_distances_alone():
    """A shift of both positions changes a score by no more than float32 angles let it."""
    q, k = (jax.random.normal(jax.random.key(n), (1, 64, 1, 64)) for n in (0, 1))
    rope = positions.RoPE()
    starts = jnp.arange(64)[None]
    turned = rope.rotate(q, starts + 1000)
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5
    )

    def score(shift):
        pair = rope.rotate(q, starts + 40 + shift) * rope.rotate(k, starts + shift)
        return np.asarray(pair.sum(-1)) / 8

    for shift, most in ((1000, 2e-5), (10_000, 3e-4), (100_000, 4e-3)):
        change = np.abs(score(shift) - score(0)).max()
        assert 0 < change < most, shift


def test_interleaved_and_rotate_half_agree_after_permuting():
    q, k = (jax.random.normal(jax.random.key(n), (1, 9, 1, 16)) for n in (0, 1))
    order = np.r_[0:16:2, 1:16:2]
    where = jnp.arange(9)[None]
    pairs, halves = positions.RoPE(interleaved=True), positions.RoPE()
    scores = [
        jnp.einsum("blhk,bshk->bls", rope.rotate(a, where), rope.rotate(b, where))
        for rope, a, b in ((pairs, q, k), (halves, q[..., order], k[..., order]))
    ]
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_pairs_of_smollm2_that_complete_a_cycle():
    cycles = 8192 * theta(positions.RoPE(base=1e5), 64) / (2 * math.pi)
    assert (cycles >= 1).sum() == 20


def test_partial_exponents_run_over_what_is_rotated():
    np.testing.assert_allclose(theta(positions.RoPE(fraction=0.5), 8), [1, 0.01], rtol=1e-6)


# Scalings


def test_interpolation_is_the_unscaled_model_at_divided_positions():
    q, k = (jax.random.normal(jax.random.key(n), (1, 5, 1, 16)) for n in (0, 1))
    where = at(0, 1, 7, 30, 31)
    scaled = positions.Linear(factor=4.0)
    np.testing.assert_array_equal(  # factors of two are exact
        scaled.rotate(q, 4 * where) * scaled.rotate(k, 4 * where),
        positions.RoPE().rotate(q, where) * positions.RoPE().rotate(k, where),
    )


@pytest.mark.parametrize(
    ("size", "factor", "base"),
    [(128, 2, 20221.3), (128, 4, 40889.9), (128, 8, 82684.6), (64, 2, 20452.2), (64, 4, 41829.4)],
)
def test_bases_of_ntk_aware_scaling(size, factor, base):
    found = theta(positions.NTK(factor=float(factor)), size)
    np.testing.assert_allclose(found, theta(positions.RoPE(base=base), size), rtol=1e-5)
    ratio = theta(positions.RoPE(), size) / found
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(factor, rel=1e-6)


def test_dynamic_ntk_by_the_length():
    for factor, alpha in ((1.0, lambda r: r), (2.0, lambda r: 2 * r - 1)):
        dynamic = positions.DynamicNTK(factor=factor, original=4096)
        for n in (1, 4096):
            np.testing.assert_array_equal(theta(dynamic, 128, n), theta(positions.RoPE()))
        for n in (8192, 12_288, 32_768):
            want = theta(positions.NTK(factor=alpha(n / 4096)))
            np.testing.assert_allclose(theta(dynamic, 128, n), want, rtol=1e-6)
    slowest = [theta(dynamic, 128, n)[-1] for n in range(4096, 40_000, 1000)]
    assert np.all(np.diff(slowest) < 0)


def test_parts_by_turns():
    rope = theta(positions.RoPE())
    turns = 4096 * rope / (2 * math.pi)
    ratio = theta(positions.ByParts(factor=8.0, original=4096)) / rope
    np.testing.assert_allclose(ratio[turns > 32], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 1], 1 / 8, rtol=1e-6)
    between = (turns < 32) & (turns > 1)
    blend = (turns[between] - 1) / 31
    np.testing.assert_allclose(ratio[between], blend + (1 - blend) / 8, rtol=1e-5)
    assert between.sum() > 20


@pytest.mark.parametrize(
    ("size", "base", "length", "low", "high"),
    [(128, 1e4, 4096, 20, 46), (128, 1e4, 2048, 16, 41), (64, 1e5, 8192, 10, 20)],
)
def test_where_yarns_ramp_begins_and_ends(size, base, length, low, high):
    ramp = positions.YaRN(base=base, original=length).ramp(size)
    assert np.flatnonzero(ramp == 0)[-1] == low
    assert np.flatnonzero(ramp == 1)[0] == high
    np.testing.assert_allclose(np.diff(ramp[low : high + 1]), 1 / (high - low), rtol=1e-9)


def test_yarns_ramp_may_never_end():
    """`high` is held to R - 1, but pairs end at R/2 - 1: none is divided by s in full."""
    assert positions.YaRN(original=1 << 24).ramp(64).max() < 1


@pytest.mark.parametrize(
    ("factor", "squared"),
    [(1, 1), (2, 1.14343), (4, 1.29648), (8, 1.45913), (16, 1.63139), (32, 1.81326)],
)
def test_yarns_temperature(factor, squared):
    yarn = positions.YaRN(factor=float(factor), original=4096)
    assert amplitude(yarn) ** 2 == pytest.approx(squared, abs=5e-6)
    x = jnp.ones((1, 1, 1, 128))
    score = (yarn.rotate(x, at(7)) ** 2).sum() / 128  # both sides carry it
    assert float(score) == pytest.approx(squared, rel=1e-5)
    dynamic = positions.DynamicYaRN(original=4096).frequencies(128, jnp.asarray(4096 * factor))
    assert float(dynamic[1]) ** 2 == pytest.approx(squared, abs=5e-6)
    np.testing.assert_allclose(dynamic[0], theta(yarn), rtol=1e-6)


def test_llama3_bands():
    rope = theta(positions.RoPE(base=5e5))
    ratio = theta(positions.Llama3(base=5e5, original=8192)) / rope
    kept, divided = np.isclose(ratio, 1, rtol=1e-6), np.isclose(ratio, 1 / 8, rtol=1e-6)
    assert (kept.sum(), divided.sum()) == (29, 29)
    assert ratio[30] == pytest.approx(0.643744, abs=1e-6)
    assert ratio[34] == pytest.approx(0.190211, abs=1e-6)
    np.testing.assert_array_equal(
        theta(positions.Llama3(base=5e5, original=8192, factor=1.0)), rope
    )


@pytest.mark.parametrize(
    ("factor", "amp"), [(1, 1), (2, 1.04083), (4, 1.08012), (8, 1.11803), (32, 1.19024)]
)
def test_amplitudes_of_longrope(factor, amp):
    ones = (1.0,) * 64
    longrope = positions.LongRoPE(factor=float(factor), original=4096, short=ones, long=ones)
    assert amplitude(longrope) == pytest.approx(amp, abs=5e-6)


def test_factors_that_make_longrope_another_method():
    exponents = np.arange(64) * 2 / 126
    for factors, other in (
        (np.ones(64), positions.RoPE()),
        (np.full(64, 4.0), positions.Linear(factor=4.0)),
        (4.0**exponents, positions.NTK(factor=4.0)),
    ):
        longrope = positions.LongRoPE(
            factor=4.0, original=4096, short=(1.0,) * 64, long=tuple(factors)
        )
        np.testing.assert_allclose(theta(longrope, 128, 4097), theta(other), rtol=1e-6)
        np.testing.assert_array_equal(theta(longrope, 128, 4096), theta(positions.RoPE()))


def test_giraffes_truncated_basis():
    rope, found = theta(positions.RoPE()), theta(positions.TruncatedBasis(original=2048))
    rho = 2 * math.pi / (16 * 2048)
    assert (found == rope).sum() == 41
    assert np.isclose(found, rho, rtol=1e-6).sum() == 14
    assert (found == 0).sum() == 9
    np.testing.assert_array_equal(theta(positions.TruncatedBasis(original=1 << 20)), rope)


def test_giraffes_power_basis():
    rope = theta(positions.RoPE())
    np.testing.assert_array_equal(theta(positions.PowerBasis(k=0.0)), rope)
    ratio = theta(positions.PowerBasis(k=0.5)) / rope
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx((2 / 128) ** 0.5, rel=1e-6)


def test_p_rope():
    np.testing.assert_allclose(theta(positions.Proportional(p=0.5), 8), [1, 0.1, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(theta(positions.Proportional(p=1.0)), theta(positions.RoPE()))
    x = jax.random.normal(jax.random.key(0), (1, 3, 1, 8))
    for p in (0.0, 0.5):
        turned = positions.Proportional(p=p).rotate(x, at(0, 5, 900))
        still = np.r_[2:4, 6:8] if p else np.arange(8)
        np.testing.assert_array_equal(turned[..., still], x[..., still])


ONE = {
    "linear": positions.Linear(factor=1.0),
    "ntk": positions.NTK(factor=1.0),
    "by_parts": positions.ByParts(factor=1.0, original=4096),
    "yarn": positions.YaRN(factor=1.0, original=4096),
    "llama3": positions.Llama3(factor=1.0, original=4096),
    "dynamic yarn": positions.DynamicYaRN(original=4096),
}


@pytest.mark.parametrize("name", ONE)
def test_a_factor_of_one_changes_nothing(name):
    frequencies, factor = ONE[name].frequencies(128, jnp.asarray(100))
    # Two ulps: dynamic YaRN adds two numbers of float32, one of which holds the length.
    np.testing.assert_allclose(frequencies, theta(positions.RoPE()), rtol=2.4e-7)
    assert float(factor) == 1


# CLEX

CLEX = positions.CLEX(original=64, factor=16.0)
DIMS = positions.Dims(width=64, heads=1, kv_heads=1, head_size=64, length=64)


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_clex_begins_as_ntk_aware(base):
    """At W_down = 0 it is dynamic NTK of factor 2 at n = t L, to what RK4 in float32 leaves."""
    clex = positions.CLEX(original=64, factor=16.0, base=base)
    params = clex.init(jax.random.key(0), DIMS)
    for t, tolerance in ((2, 8e-6), (4, 8e-6), (16, 3e-5)):
        found = theta(clex, 64, 64 * t, params)
        want = theta(positions.NTK(base=base, factor=2.0 * t - 1), 64)
        np.testing.assert_allclose(found, want, rtol=tolerance)
        dynamic = positions.DynamicNTK(base=base, original=64, factor=2.0)
        np.testing.assert_allclose(found, theta(dynamic, 64, 64 * t), rtol=tolerance)
        assert found[0] == 1
    np.testing.assert_array_equal(theta(clex, 64, 64, params), theta(positions.RoPE(base), 64))


def test_clex_stays_rope_at_one_whatever_it_learns_and_positive():
    keys = jax.random.split(jax.random.key(1), 2)
    params = {
        "up": jax.random.normal(keys[0], (32, 64)),
        "down": 0.1 * jax.random.normal(keys[1], (64, 32)),
    }
    for n in (1, 64):
        np.testing.assert_array_equal(theta(CLEX, 64, n, params), theta(positions.RoPE(), 64))
    assert np.all(theta(CLEX, 64, 1024, params) > 0)
    np.testing.assert_array_equal(  # t is held to its largest
        theta(CLEX, 64, 1024, params), theta(CLEX, 64, 9999, params)
    )


def test_clex_learns_from_down_first():
    params = CLEX.init(jax.random.key(0), DIMS)
    gradient = jax.grad(lambda p: CLEX.frequencies(64, jnp.asarray(300), p)[0].sum())(params)
    assert np.all(gradient["up"] == 0)
    assert np.abs(gradient["down"]).max() > 1e-3


# xPos


def _scores(encoding, q, k, where):
    context = Context(where, jnp.ones_like(where), jnp.full_like(where, -1))
    (part,) = encoding.parts({}, q, encoding.keys({}, k, context), context, context)
    return np.asarray(jnp.einsum("blhk,bshk->bls", part.q_BLHK, part.k_BSGK)[0])


def test_xpos_decays_each_pair_by_its_distance():
    """Pair i alone: its score beside that of RoPE is zeta_i^((m - n) / 512)."""
    where, xpos = at(*range(0, 400, 50)), positions.XPos()
    distance = np.asarray(where[0][:, None] - where[0])
    for i in (0, 3, 7):
        x = jnp.zeros((1, 8, 1, 16)).at[..., i].set(1.0)
        plain = _scores(positions.RoPE(), x, x, where)
        zeta = (2 * i / 16 + 0.4) / 1.4
        assert zeta < 1
        np.testing.assert_allclose(
            _scores(xpos, x, x, where), plain * zeta ** (distance / 512), atol=1e-5
        )


def test_xpos_knows_distances_alone_and_becomes_rope():
    q, k = (jax.random.normal(jax.random.key(n), (1, 8, 1, 16)) for n in (0, 1))
    where = at(*range(8))
    near, far = (_scores(positions.XPos(), q, k, where + shift) for shift in (0, 1000))
    np.testing.assert_allclose(near, far, atol=2e-4)
    slow = positions.XPos(scale_base=1e9)
    plain = _scores(positions.RoPE(), q, k, where)
    np.testing.assert_allclose(_scores(slow, q, k, where), plain, atol=1e-5)
