"""Intervals against scipy and against published or hand-computed figures."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from lcm.evaluation import statistics

# successes, trials, low, high: 95% Wilson limits to three places
WILSON = [
    (428, 500, 0.823, 0.884),
    (10, 20, 0.299, 0.701),
    (20, 20, 0.839, 1.000),
    (43, 50, 0.738, 0.930),
]


@pytest.mark.parametrize(("successes", "trials", "low", "high"), WILSON)
def test_wilson_known_values(successes, trials, low, high):
    interval = statistics.wilson(successes, trials)
    assert interval.value == successes / trials
    assert round(interval.low, 3) == low
    assert round(interval.high, 3) == high


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy(counts):
    ours = statistics.wilson(*counts)
    theirs = scipy.stats.binomtest(*counts).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@pytest.mark.parametrize("counts", [(3, 2), (-1, 4), (0, 0)])
def test_wilson_refuses_what_is_no_proportion(counts):
    with pytest.raises(ValueError, match="not a proportion"):
        statistics.wilson(*counts)


def test_bootstrap_of_a_ratio_agrees_with_scipy():
    rng = np.random.default_rng(1)
    tokens_D = rng.integers(50, 500, 40).astype(float)
    sums_D = tokens_D * rng.normal(2.0, 0.4, 40)
    ours = statistics.bootstrap(sums_D, tokens_D, seed=3)
    theirs = scipy.stats.bootstrap(
        (sums_D, tokens_D),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=10_000,
        rng=4,
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == sums_D.sum() / tokens_D.sum()
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_bootstrap_covers_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    trials, n, p = 600, 200, 0.7
    samples = rng.random((trials, n)) < p
    covered = 0
    for seed, sample in enumerate(samples):
        interval = statistics.bootstrap(sample.astype(float), replicates=500, seed=seed)
        covered += interval.low <= p <= interval.high
    # 95% +- 3 standard errors of a proportion over 600 trials, and 1% that n=200 costs
    assert 0.915 < covered / trials < 0.98


def test_bootstrap_resamples_documents_not_tokens():
    """Tokens that repeat their document's value a hundredfold add no certainty."""
    rng = np.random.default_rng(5)
    value_D = rng.normal(size=30)
    once = statistics.bootstrap(value_D)
    often = statistics.bootstrap(100 * value_D, np.full(30, 100.0))
    assert often == pytest.approx(once)


def test_bootstrap_is_seeded_and_chunks_do_not_matter(monkeypatch):
    values = np.random.default_rng(2).normal(size=50)
    first = statistics.bootstrap(values, seed=7)
    assert statistics.bootstrap(values, seed=7) == first
    assert statistics.bootstrap(values, seed=8) != first
    monkeypatch.setattr(statistics, "_CHUNK", 1234)
    assert statistics.bootstrap(values, seed=7) == pytest.approx(first, abs=1e-12)


def test_one_document_has_no_interval():
    interval = statistics.bootstrap(np.array([3.0]), np.array([2.0]))
    assert interval.value == 1.5
    assert math.isnan(interval.low) and math.isnan(interval.high)


def test_resamples_in_which_nothing_counts_are_left_out():
    """Only one document of three reaches this position: 8 in 27 draws miss it."""
    numerator_DK, count_DK = np.array([[2.0], [0.0], [0.0]]), np.array([[1.0], [0.0], [0.0]])
    replicates_RK = statistics.resampled_ratios(numerator_DK, count_DK)
    assert np.isnan(replicates_RK).mean() == pytest.approx(8 / 27, abs=0.02)
    assert statistics.percentile(2.0, replicates_RK[:, 0], n=3) == (2.0, 2.0, 2.0)


def test_paired_bootstrap_sees_what_separate_intervals_hide():
    """Documents differ by whole nats, the models by 0.01 on each: only pairing shows it."""
    rng = np.random.default_rng(9)
    tokens_D = rng.integers(100, 200, 60).astype(float)
    difficulty_D = rng.normal(2, 0.5, 60)
    a_D = tokens_D * difficulty_D
    b_D = tokens_D * (difficulty_D - 0.01 + rng.normal(0, 0.01, 60))
    difference = statistics.paired_bootstrap(a_D, b_D, tokens_D)
    a, b = statistics.bootstrap(a_D, tokens_D), statistics.bootstrap(b_D, tokens_D)
    assert difference.value == pytest.approx(a.value - b.value)
    assert 0 < difference.low < 0.01 < difference.high
    assert b.low < a.value < b.high
    replicates_RK = statistics.resampled_ratios(np.stack([a_D, b_D], 1), tokens_D[:, None])
    columns = statistics.percentile(
        a.value - b.value, replicates_RK[:, 0] - replicates_RK[:, 1], n=60
    )
    assert columns == pytest.approx(difference, abs=1e-9)


def test_hierarchical_bootstrap_adds_the_variance_between_seeds():
    """With S seeds of variance T and n instances of variance V: Var = T/S + V/(S n)."""
    rng = np.random.default_rng(11)
    seeds, n = 40, 50
    scores = [rng.normal(rng.normal(0, 1.0), 2.0, n) for _ in range(seeds)]
    interval = statistics.hierarchical_bootstrap(scores)
    means = [np.mean(s) for s in scores]
    # seeds resampled: variance of the seed means; instances within them: their variance once more
    within = np.mean([np.var(s) for s in scores]) / (seeds * n)
    expected = 2 * 1.96 * math.sqrt(np.var(means) / seeds + within)
    assert interval.value == pytest.approx(np.mean(means))
    assert interval.high - interval.low == pytest.approx(expected, rel=0.05)
    flat = statistics.bootstrap(np.concatenate(scores))
    assert interval.high - interval.low > 2 * (flat.high - flat.low)


def test_hierarchical_bootstrap_of_one_seed_is_the_plain_one():
    scores = np.random.default_rng(0).random(100)
    one = statistics.hierarchical_bootstrap([scores])
    plain = statistics.bootstrap(scores)
    assert one == pytest.approx(plain, abs=0.004)


def test_hierarchical_bootstrap_weighs_seeds_equally_and_refuses_empty_ones():
    assert statistics.hierarchical_bootstrap([np.zeros(10), np.ones(90)]).value == 0.5
    with pytest.raises(ValueError, match="at least one score"):
        statistics.hierarchical_bootstrap([np.zeros(0), np.ones(3)])


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_equals_scipy(only_a, only_b):
    discordant = only_a + only_b
    statistic, p_value = statistics.mcnemar(only_a, only_b)
    assert p_value == pytest.approx(scipy.stats.chi2.sf(statistic, 1))
    if discordant:
        assert statistic == pytest.approx(max(abs(only_a - only_b) - 1, 0) ** 2 / discordant)
        exact = scipy.stats.binomtest(only_a, discordant, 0.5).pvalue
        assert statistics.mcnemar_exact(only_a, only_b) == pytest.approx(exact)
    else:
        assert statistics.mcnemar_exact(0, 0) == 1.0


def test_mcnemar_textbook_example():
    """121 against 59 discordant pairs: (62 - 1)^2 / 180 = 20.67, as in every textbook."""
    assert statistics.mcnemar(121, 59)[0] == pytest.approx(20.672, abs=5e-4)
