"""Temperatures and stretched tables against published values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import arrays, attended

from lcm import positions
from lcm.positions import alibi
from lcm.positions.stretch import stretch
from lcm.types import Context


def where(*numbers):
    numbers = jnp.asarray([numbers], jnp.int32)
    return Context(numbers, jnp.ones_like(numbers), jnp.full_like(numbers, -1))


def factor(encoding, *at, among=None, params=None):
    """The factor on queries at these positions."""
    here = where(*at)
    found = encoding.factor_BLH(params or {}, here, where(*(among or at)))
    return np.broadcast_to(np.asarray(found)[0, :, 0], len(at))


def test_log_n():
    log = positions.LogN(original=4096)
    found = factor(log, 0, 100, 4095, 8191)
    np.testing.assert_allclose(found, [1, 1, 1, 13 / 12], rtol=1e-6)
    within = positions.LogN(original=4096, within=True)
    np.testing.assert_allclose(factor(within, 0, 63, 8191), [0, 0.5, 13 / 12], atol=1e-6)


def test_log_of_the_documents_length():
    log = positions.LogLength(original=4096)
    np.testing.assert_allclose(factor(log, 5, among=range(8192)), 13 / 12, rtol=1e-6)
    np.testing.assert_array_equal(factor(log, 5, among=range(100)), 1)


def test_log_n_bounds_the_entropy_of_a_peak():
    """n keys, one with a score higher by s: H stays bounded where s grows with ln n, else not."""

    def entropy(n, s):
        p = np.exp(s) / (np.exp(s) + n - 1)
        q = (1 - p) / (n - 1)
        return -p * np.log(p) - (n - 1) * q * np.log(q)

    log = positions.LogN(original=16)
    lengths = (2**8, 2**12, 2**16, 2**20)
    scaled = [entropy(n, 5.0 * float(factor(log, n - 1)[0])) for n in lengths]
    plain = [entropy(n, 5.0) for n in lengths]
    assert np.all(np.diff(scaled) < 0) and np.all(np.diff(plain) > 1)


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, 1), (8190, 1), (8191, 1.06931), (16383, 1.10986), (131071, 1.28332)],
)
def test_llama4_temperature(at, value):
    assert factor(positions.FloorScale(), at)[0] == pytest.approx(value, abs=5e-6)


def test_length_scale_of_qwen():
    scale = positions.LengthScale(original=8)
    assert factor(scale, 3, among=range(32))[0] == pytest.approx(1.29648, abs=5e-6)
    for n in (1, 7, 8):
        np.testing.assert_array_equal(factor(scale, 0, among=range(n)), 1)
    assert factor(scale, 3, among=range(9))[0] == pytest.approx(1, abs=0.03)  # continuous at L


@pytest.mark.parametrize(("s", "best"), [(2.0, 1.2), (4.0, 1.5), (8.0, 1.8)])
def test_uniform_scale_is_near_the_best_factors(s, best):
    assert positions.uniform_scale(s) == pytest.approx(1 + 0.3973 * math.log(s))
    assert positions.uniform_scale(s) == pytest.approx(best, abs=0.08)


def test_a_scale_of_one_is_bit_identical_and_others_scale_scores():
    q, k, v = arrays()
    here = where(*range(24))

    @jax.jit
    def run(q, params):
        encodings = [positions.NoPE(), positions.UniformScale(1.0), positions.UniformScale(1.5)]
        scaled = positions.HeadScale(), params
        pairs = [*((e, {}) for e in encodings), scaled]
        return [attended(e, p, q, k, v, here) for e, p in pairs]

    ones = {"head_scale": jnp.ones(2)}
    plain, one, more, heads = run(q, ones)
    np.testing.assert_array_equal(plain, one)
    np.testing.assert_array_equal(plain, heads)
    by_hand, *_, heads = run(1.5 * q, {"head_scale": jnp.asarray([1.0, 2.0])})
    np.testing.assert_allclose(more, by_hand, atol=1e-6)
    doubled, *_ = run(3.0 * q, ones)
    np.testing.assert_allclose(heads[:, :, 0], by_hand[:, :, 0], atol=1e-6)
    np.testing.assert_allclose(heads[:, :, 1], doubled[:, :, 1], atol=1e-6)


def test_head_scales_begin_where_they_are_told_and_stay_above_one():
    dims = positions.Dims(width=16, heads=2, kv_heads=1, head_size=8, length=8)
    params = positions.HeadScale(factor=1.6).init_layer(jax.random.key(0), dims)
    np.testing.assert_allclose(params["head_scale"], [1.6, 1.6])
    projected = positions.HeadScale().project({"head_scale": jnp.asarray([0.3, 1.7])})
    np.testing.assert_allclose(projected["head_scale"], [1.0, 1.7])


def test_alignment_divides_after_the_bias():
    (part,) = positions.Chain(positions.Aligned(0.5), positions.ALiBi()).parts(
        {"first": {"temperature": jnp.asarray(0.5)}},
        *(jnp.zeros((1, 4, 2, 8)),) * 2,
        *(where(0, 1, 2, 3),) * 2,
    )
    score = part.score_mod(jnp.full((1, 1), 3.0), jnp.asarray([[3]]), jnp.asarray([[1]]), 0)
    assert float(score[0, 0]) == pytest.approx(2 * (3 - 2 * alibi.slopes(2)[0]))


def test_chunks_of_llama4_see_themselves_alone():
    """The first token of a chunk sees itself; it is no sliding window."""
    zero = jnp.zeros((1, 12, 1, 8))
    here = where(*range(12))
    (part,) = positions.Chunked(size=5).parts({}, zero, zero, here, here)
    seen = np.asarray(part.mask.shows(jnp.arange(12)[:, None], jnp.arange(12)))
    i, j = np.arange(12)[:, None], np.arange(12)
    np.testing.assert_array_equal(seen, (j <= i) & (i // 5 == j // 5))


# Stretched tables


def test_long_clips_table():
    line = jnp.arange(77.0)[:, None] * jnp.asarray([1.0, -2.0])
    found = np.asarray(stretch(line, 248, keep=20))
    assert found.shape == (248, 2)
    np.testing.assert_array_equal(found[:20], line[:20])
    want = np.r_[np.arange(20), 20 + np.arange(228) / 4]
    np.testing.assert_allclose(found[:, 0], want, rtol=1e-6)
    assert found[247, 0] == pytest.approx(76.75)
    noise = jax.random.normal(jax.random.key(0), (77, 3))
    found = np.asarray(stretch(noise, 248, keep=20))
    np.testing.assert_array_equal(found[:20], noise[:20])
    for r in range(4):
        between = (1 - r / 4) * noise[20:76] + r / 4 * noise[21:77]
        np.testing.assert_allclose(found[20 + r : 244 : 4], between, atol=1e-6)
        np.testing.assert_allclose(
            found[244 + r], noise[76] + r / 4 * (noise[76] - noise[75]), atol=1e-6
        )


@pytest.mark.parametrize(("rows", "keep", "times"), [(16, 0, 4), (16, 5, 3), (33, 20, 2)])
def test_stretching_by_whole_factors(rows, keep, times):
    table = jax.random.normal(jax.random.key(1), (rows, 2))
    longer = stretch(table, times * rows - (times - 1) * keep, keep)
    np.testing.assert_allclose(longer[keep::times], table[keep:], atol=1e-6)
    np.testing.assert_array_equal(stretch(table, rows, keep), table)
    if not keep:  # the last row repeats, where Long-CLIP's line would go on
        np.testing.assert_allclose(longer[-times:], np.tile(table[-1], (times, 1)), atol=1e-6)
