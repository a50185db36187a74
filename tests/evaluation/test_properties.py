"""Properties of sequences: closed forms, and metrics by quartile."""

import math

import numpy as np
import pytest

from lcm.evaluation import properties as P
from lcm.evaluation.documents import Document
from lcm.evaluation.windows import cut, token_losses


def test_nothing_is_said_again():
    assert [P.repetition(range(9), n) for n in P.ORDERS] == [0, 0, 0, 0]
    assert P.repetition_rate(range(9)) == 0


def test_everything_is_said_again():
    assert [P.repetition([7] * 9, n) for n in P.ORDERS] == [1, 1, 1, 1]
    assert P.repetition_rate("aaaaa") == 1


def test_distinct_n_grams_are_counted_not_occurrences():
    # a b a c: a twice of {a, b, c}; ab ba ac once each
    assert P.repetition("abac", 1) == pytest.approx(1 / 3)
    assert P.repetition("abac", 2) == 0
    assert P.repetition("ababab", 2) == 1 and P.repetition("ababc", 2) == pytest.approx(1 / 3)
    assert P.repetition_rate("ababc") == 0  # no trigram twice
    assert P.repetition_rate("ababababc") == pytest.approx(
        (2 / 3 * 2 / 3 * 2 / 3 * 2 / 3) ** (1 / 4)
    )
    assert math.isnan(P.repetition("ab", 3)) and math.isnan(P.repetition_rate("ab"))


@pytest.mark.parametrize("seed", range(4))
def test_doubling_says_everything_again(seed):
    tokens = np.random.default_rng(seed).integers(0, 12, 30)
    twice = np.concatenate([tokens, tokens])
    assert P.repetition(twice, 1) == 1
    assert all(P.repetition(twice, n) >= P.repetition(tokens, n) for n in P.ORDERS)


def test_gaps():
    assert P.irregularity([0, 5, 10, 15]) == (0, 5, 0)
    gaps = [1.0, 2.0, 4.0, 9.0]
    got = P.irregularity(np.cumsum([0, *gaps]))
    assert got.deviation == pytest.approx(np.std(gaps, ddof=1)) and got.mean == 4
    assert got.quartile_range == pytest.approx(5.25 - 1.75)
    assert math.isnan(P.irregularity([3.0]).mean)
    assert math.isnan(P.irregularity([3.0, 4.0]).deviation) and P.irregularity([3.0, 4.0]).mean == 1
    with pytest.raises(ValueError, match="time 1 follows 2"):
        P.irregularity([2, 1])


def test_quartiles_are_equal_and_never_part_ties():
    assert P.quartiles([5, 1, 3, 8, 7, 2, 6, 4]).tolist() == [2, 0, 1, 3, 3, 0, 2, 1]
    assert P.quartiles([0, 0, 0, 0, 0, 0, 1, 2]).tolist() == [0] * 6 + [3, 3]
    with pytest.raises(ValueError, match="3 values"):
        P.quartiles([1, 2, 3])
    with pytest.raises(ValueError, match="1 of them nan"):
        P.quartiles([1, 2, 3, math.nan])


def test_metrics_by_quartile():
    rng = np.random.default_rng(0)
    values = np.arange(400)
    tokens = rng.integers(5, 20, 400)
    rate = np.repeat([1.0, 2.0, 3.0, 4.0], 100)
    losses = tokens * (rate + rng.normal(size=400) * 0.1)
    got = P.by_quartile(values, losses, tokens)
    for part, one in enumerate(got):
        own = slice(100 * part, 100 * part + 100)
        assert one.value == pytest.approx(losses[own].sum() / tokens[own].sum())
        assert one.low < one.value < one.high and one.high - one.low < 0.1
        assert one.low < part + 1 + 0.03 and one.high > part + 1 - 0.03
    empty = P.by_quartile([0, 0, 0, 0, 0, 0, 1, 2], np.ones(8))
    assert empty[1] is None and empty[2] is None and empty[0].value == 1
    with pytest.raises(ValueError, match="400 values for metrics"):
        P.by_quartile(values, losses[:3])


def document(size, seed=0):
    ids = np.random.default_rng(seed).integers(2, 50, size + 1).astype(np.int32)
    return Document(f"d{seed}", ids[:-1], ids[1:], size)


def looking_back(batch):
    """The loss of a token is the sum of what its window has before it."""
    return np.cumsum(batch.tokens_BL * (batch.context.segments_BL > 0), 1).astype(np.float32)


@pytest.mark.parametrize(
    ("size", "context", "stride"), [(10, 4, 1), (11, 4, 3), (3, 8, 2), (9, 4, 4)]
)
def test_every_token_is_scored_once_with_the_context_there_is(size, context, stride):
    one = document(size)
    plan = P.sliding([size], context, stride)
    (losses,) = token_losses(looking_back, [one], plan, batch_tokens=8)
    assert not np.isnan(losses).any()
    widths = plan.end_W - plan.start_W
    assert (widths == min(size, context)).all()
    scored = np.concatenate(
        [np.arange(a, b) for a, b in zip(plan.scored_W, plan.end_W, strict=True)]
    )
    assert scored.tolist() == list(range(size))
    for start, first, end in zip(plan.start_W, plan.scored_W, plan.end_W, strict=True):
        for place in range(first, end):
            assert losses[place] == one.tokens_N[start : place + 1].sum()


def test_one_window_over_all_is_one_forward():
    one = document(7)
    (slid,) = token_losses(looking_back, [one], P.sliding([7], 9, 1), batch_tokens=64)
    (whole,) = token_losses(looking_back, [one], cut([7], 7, 7), batch_tokens=64)
    np.testing.assert_array_equal(slid, whole)


def test_perplexity_by_place_in_the_sequence():
    losses = [np.log([2.0, 2.0, 8.0, 8.0]), np.log([2.0, 2.0, 8.0]), np.array([np.nan, np.log(2)])]
    got = P.perplexity_by_position(losses, [0, 2, 4, 6])
    assert [one.value for one in got.bins[:2]] == pytest.approx([2, 8])
    assert got.bins[0].low == pytest.approx(2) and got.bins[1].high == pytest.approx(8)
    assert math.isnan(got.bins[2].value)
