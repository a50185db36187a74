"""Counts of a rate that decays: their means, what is told of them, and what can be foreseen."""

import numpy as np
import pytest
from scipy import integrate, stats

from lcm.data.counts import DecayingCounts, poisson_nats
from lcm.errors import ConfigError

SMALL = DecayingCounts(lives=(1.0, 5.0), peaks=(1.0, 4.0), most=6)


def test_means_are_integrals_of_the_rate():
    times, begins = np.array([[0.0, 0.7, 1.0, 4.0, 4.5]]), np.array([[1, 0, 1, 0, 0]], bool)
    got = SMALL.expected(times, begins)[0]
    for k, (life, peak) in enumerate(SMALL.kinds):
        for n, began in enumerate((0.0, 0.0, 1.0, 1.0)):
            rate = lambda t: SMALL.floor + peak * np.exp(-(t - began) / life)  # noqa: B023, E731
            want, _ = integrate.quad(rate, times[0, n], times[0, n + 1])
            assert got[n, k] == pytest.approx(want, rel=1e-9)


def test_merged_intervals_have_the_sum_of_their_means():
    times, begins = np.array([[0.0, 0.3, 2.0, 2.5, 7.0]]), np.zeros((1, 5), bool)
    begins[:, 0] = True
    parts = SMALL.expected(times, begins)
    merged = SMALL.expected(times[:, [0, 2, 4]], begins[:, [0, 2, 4]])
    np.testing.assert_allclose(parts.reshape(1, 2, 2, -1).sum(2), merged, rtol=1e-12)


def test_counts_have_the_means_of_their_kind():
    task = DecayingCounts(most=1000)
    streams = task.streams((3,), 4000, 12)
    mean_BLK = task.expected(streams.times, streams.begins)
    for kind in range(len(task.kinds)):
        own = streams.kind_B == kind
        mean = mean_BLK[own, :, kind].sum(0)
        apart = (streams.counts_BL[own].sum(0) - mean) / mean**0.5
        assert 0.4 < own.mean() * len(task.kinds) < 1.6 and np.abs(apart).max() < 4
    tau_BL = np.diff(streams.times)
    assert abs(tau_BL.mean() - 1) < 0.05
    assert abs(streams.begins[:, 1:].mean() - task.renewal) < 0.01


@pytest.mark.parametrize("most", [1, 6])
def test_probabilities_are_those_of_poisson_and_sum_to_one(most):
    mean = np.array([1e-9, 0.3, 2.0, 40.0])[None, None]
    got = np.exp([-poisson_nats(mean, np.array([[n]]), most)[0, 0] for n in range(most + 1)])
    want = stats.poisson.pmf(np.arange(most)[:, None], mean[0])
    np.testing.assert_allclose(got[:-1], want, rtol=1e-9)
    np.testing.assert_allclose(got[-1], stats.poisson.sf(most - 1, mean[0, 0]), rtol=1e-9)
    np.testing.assert_allclose(got.sum(0), 1, rtol=1e-9)


def test_tokens_tell_counts_that_are_past_and_bursts_that_begin():
    streams = SMALL.streams((1, 2), 3, 40)
    batch = SMALL.batch(streams)
    count_BL, begins_BL = batch.tokens_BL % 7, batch.tokens_BL // 7
    assert batch.tokens_BL.max() < SMALL.vocab == 14 and begins_BL[:, 0].all()
    assert (begins_BL == streams.begins[:, :-1]).all()
    assert (count_BL[:, 1:] == streams.counts_BL[:, :-1]).all() and not count_BL[:, 0].any()
    assert (batch.targets_BL == streams.counts_BL).all()
    assert (np.asarray(batch.loss_weight_BL) == 1).all() and batch.context.interval_BL is None


def test_what_is_foreseen_is_bayes_rule():
    streams = SMALL.streams((5,), 2, 9)
    nats = SMALL.foreseen(streams)
    mean_BLK = SMALL.expected(streams.times, streams.begins)
    for row in range(2):
        chance_K = np.ones(4) / 4  # of all counts so far, by kind
        for n, count in enumerate(streams.counts_BL[row]):
            each_K = stats.poisson.pmf(count, mean_BLK[row, n])
            if count == SMALL.most:
                each_K = stats.poisson.sf(SMALL.most - 1, mean_BLK[row, n])
            want = (chance_K * each_K).sum() / chance_K.sum()
            assert nats[row, n] == pytest.approx(-np.log(want), rel=1e-9)
            chance_K = chance_K * each_K


def test_who_knows_more_foresees_more():
    streams = SMALL.streams((6,), 400, 24)
    told, foreseen = SMALL.told(streams).mean(0), SMALL.foreseen(streams).mean(0)
    early = SMALL.foreseen_early(streams, 6).mean()
    rate = streams.counts_BL.sum() / streams.times[:, -1].sum()
    assert told[0] + 0.02 < foreseen[0] and abs(told - foreseen)[-4:].max() < 0.02
    assert told.mean() < foreseen.mean() < early
    assert foreseen.mean() < SMALL.at_a_rate(streams, rate).mean()
    one = DecayingCounts(lives=(2.0,), peaks=(3.0,))
    only = one.streams((7,), 4, 16)
    np.testing.assert_allclose(one.foreseen(only), one.told(only), rtol=1e-12)


def test_where_intervals_are_equal_their_ends_are_foreseen():
    clock = DecayingCounts(irregularity=0.0, most=6)
    streams = clock.streams((8,), 8, 20)
    np.testing.assert_allclose(
        clock.foreseen_early(streams), clock.foreseen(streams), rtol=1e-3, atol=1e-3
    )


def test_how_intervals_spread_is_learnt_from_those_before():
    """Where a stream keeps time, the next end is foreseen ever better, though any is possible."""
    times = np.arange(81.0)[None]
    streams = SMALL.streams((11,), 1, 80)._replace(times=times)
    lost_L = (SMALL.foreseen_early(streams) - SMALL.foreseen(streams))[0]
    assert np.abs(lost_L[:3]).max() > 0.03 and np.abs(lost_L[-20:]).max() < 0.01


def test_an_interval_that_is_not_known_has_any_length_by_its_odds():
    """The first count, before which there is nothing: its odds are shares of many streams."""
    streams = SMALL.streams((9,), 60_000, 1)
    share = np.bincount(streams.counts_BL[:, 0], minlength=7) / 60_000
    first = streams._replace(
        times=streams.times[:7], begins=streams.begins[:7], counts_BL=np.arange(7)[:, None]
    )
    odds = np.exp(-SMALL.foreseen_early(first)[:, 0])
    assert odds.sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(odds, share, atol=4 * (0.25 / 60_000) ** 0.5)


def test_a_seed_decides_the_streams():
    one, same, other = (SMALL.streams(seed, 3, 5) for seed in ((1, 2), (1, 2), (1, 3)))
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert (one.times != other.times).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lives": (1.0, 0.0)}, r"lives=\(1.0, 0.0\)"),
        ({"peaks": ()}, r"peaks=\(\)"),
        ({"floor": 0.0}, "floor=0.0 of DecayingCounts must lie between 1e-06"),
        ({"renewal": 1.5}, "renewal=1.5"),
        ({"most": 0}, "most=0"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        DecayingCounts(**fields)
