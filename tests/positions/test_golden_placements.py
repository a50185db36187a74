"""Statistics of training positions against their cards."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import positions
from lcm.types import Batch, Context

T, ROWS = 64, 4000


@functools.cache
def drawn(placement, length=T, rows=ROWS, seed=0):
    """Tokens and positions `[rows, length]`; each token is its own place in the text."""

    @jax.jit
    def draw(key):
        text = jnp.broadcast_to(
            jnp.arange(length * placement.span), (rows, length * placement.span)
        )
        context = Context(text, jnp.ones_like(text), jnp.full_like(text, -1))
        batch = Batch(text, text + 1, context, jnp.ones(text.shape))
        found = placement(key, batch, length)
        return found.tokens_BL, found.targets_BL, found.context.positions_BL

    placement.check(length)
    tokens, targets, places = map(np.asarray, draw(jax.random.key(seed)))
    assert tokens.shape == places.shape == (rows, length)
    np.testing.assert_array_equal(targets, tokens + 1)
    assert np.all(np.diff(places, axis=1) > 0)
    return tokens, places


def distances(places, most):
    """The share of rows in which each distance 1 .. most - 1 occurs."""
    share = np.zeros(most)
    for row in places:
        there = np.unique(row[:, None] - row)
        share[there[there > 0]] += 1
    return share[1:] / len(places)


def runs(places):
    """First places of the runs of consecutive positions of one row."""
    return [0, *(np.flatnonzero(np.diff(places) > 1) + 1)]


def test_randomised_positions():
    _, places = drawn(positions.Randomised(range=256))
    assert places.min() == 0 and places.max() == 255
    # the k-th smallest of T from N without replacement: (k + 1)(N + 1)/(T + 1) - 1 in the mean
    expected = np.arange(1, T + 1) * 257 / 65 - 1
    error = places.std(0) / ROWS**0.5
    assert np.all(np.abs(places.mean(0) - expected) < 5 * error)
    assert np.diff(places).mean() == pytest.approx(257 / 65, rel=0.01)
    np.testing.assert_array_equal(drawn(positions.Randomised(range=T))[1][0], np.arange(T))
    assert drawn(positions.Randomised())[1].max() == 2 * T - 1


def test_pose():
    pose = positions.PoSE(factor=4, text=3)
    tokens, places = drawn(pose)
    assert np.all(places[:, 0] == 0) and places.max() == 4 * T - 1
    first = np.array([runs(row)[-1] for row in places])  # 0 where nothing is skipped
    skipped = first > 0
    assert skipped.mean() == pytest.approx(1 - 1 / (3 * T + 1), abs=0.01)
    counts = np.bincount(first[skipped], minlength=33)
    assert counts[0] == 0 and counts[33:].sum() == 0
    expected = skipped.sum() / 32
    assert np.all(np.abs(counts[1:] - expected) < 5 * expected**0.5)  # uniform in 1 .. T/2
    np.testing.assert_array_equal(tokens[:, 0], 0)
    for text, row, start in zip(tokens[:50], places[:50], first[:50], strict=True):
        if start:
            assert np.all(np.diff(text[:start]) == 1) and np.all(np.diff(text[start:]) == 1)
            assert np.all(np.diff(row[start:]) == 1)
    assert tokens.max() == 3 * T - 1  # the second chunk ends anywhere in the text
    assert np.all(distances(places, 4 * T) > 0)


@pytest.mark.parametrize(
    "placement",
    [positions.PoSE(factor=1, text=1), positions.CREAM(factor=1), positions.Segmented(factor=1)],
)
def test_a_factor_of_one_is_the_ordinary_batch(placement):
    tokens, places = drawn(placement, rows=20)
    np.testing.assert_array_equal(places, np.tile(np.arange(T), (20, 1)))
    np.testing.assert_array_equal(tokens, places)


def test_creams_windows():
    """P(a) of the release, whose distribution function is not normalised."""
    u = (np.arange(200_000) + 0.5) / 200_000
    a = np.floor(positions.CREAM(factor=4).quantile(jnp.asarray(u, jnp.float32))).astype(int)
    share = np.bincount(a)[2:] / len(a)
    points = np.linspace(2, 8, 1000)
    mass = [0.5 * (1 + math.erf((x - 5) / (3 * 2**0.5))) for x in points]
    want = np.bincount(np.floor(np.interp(u, mass, points)).astype(int))[2:] / len(u)
    np.testing.assert_allclose(share, want, atol=1e-4)
    # The card's are of 6,000 draws: within three deviations and its rounding.
    card = np.array([0.25, 0.12, 0.13, 0.13, 0.12, 0.10, 0.15])
    assert np.all(np.abs(share - card) < 3 * (share * (1 - share) / 6000) ** 0.5 + 0.005)


def test_cream():
    tokens, places = drawn(positions.CREAM(factor=4), rows=6000)
    np.testing.assert_array_equal(tokens, places)
    assert np.all(places[:, 0] == 0) and np.all(places[:, -1] == 4 * T - 1)
    tails = np.array([T - runs(row)[-1] for row in places])
    heads = np.array([runs(row)[1] for row in places])
    for h in (16, 21):  # a half each, but where the middle run meets head or tail
        assert (tails == h).mean() == pytest.approx(0.5, abs=0.03)
        assert 0.25 < (heads == h).mean() < 0.5
    assert {len(runs(row)) for row in places} <= {2, 3}
    share = distances(places, 4 * T)
    assert share.min() == pytest.approx(0.23, abs=0.02)


def test_segments():
    tokens, places = drawn(positions.Segmented(factor=4, chunk=16))
    np.testing.assert_array_equal(tokens, places)
    assert np.all(places.reshape(ROWS, 4, 16)[:, :, 0] % 16 == 0)
    assert np.all(np.diff(places.reshape(ROWS, 4, 16), axis=2) == 1)
    chosen = np.bincount((places[:, ::16] // 16).reshape(-1), minlength=16) / ROWS
    np.testing.assert_allclose(chosen, 1 / 4, atol=0.05)
    tokens, places = drawn(positions.Segmented(factor=4, chunk=16, prefix=True))
    np.testing.assert_array_equal(places[:, T // 2 :], np.tile(np.arange(224, 256), (ROWS, 1)))
    assert places[:, : T // 2].max() == 223 and np.all(tokens == places)


def test_clex_positions():
    spans = set()
    for seed in range(12):
        tokens, places = drawn(positions.CLEXScales(factor=3), rows=40, seed=seed)
        assert np.all(places[:, 0] == 0)
        (last,) = np.unique(places[:, -1])
        assert (last + 1) % T == 0
        spans.add((last + 1) // T)
        if last + 1 == T:
            np.testing.assert_array_equal(places, tokens)
    assert spans == {1, 2, 3}


def test_jittered_positions():
    tokens, places = drawn(positions.Jittered(unit=64))
    np.testing.assert_array_equal(tokens, np.tile(np.arange(T), (ROWS, 1)))
    assert places.max() <= 64 * T
    steps = np.diff(places, axis=1) / 64
    # Steps of mean 1, shrunk in the half of the rows that are too long: E min(1, T / S) - 1 is
    # -sqrt(1 / (6 pi T)) for a sum S of variance T / 3.
    assert steps.mean() == pytest.approx(1 - (1 / (6 * np.pi * T)) ** 0.5, abs=0.01)
    assert steps.min() < 0.05 and steps.max() > 1.9
