"""The algebra of masks, and what they show."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm.ops.attention import Mask, causal, chunks, prefix, sinks, visible, window
from lcm.types import Context


def context(length, segments=None):
    positions = np.arange(length, dtype=np.int32)[None]
    segments = np.ones_like(positions) if segments is None else np.asarray([segments], np.int32)
    return Context(positions, segments, np.full_like(positions, -1))


def dense(mask, length=12):
    where = context(length)
    return np.asarray(visible(mask, where, where))[0]


SIZES = st.integers(1, 14)
ONE_SIDED = st.one_of(st.just(causal()), SIZES.map(window), SIZES.map(sinks), SIZES.map(prefix))
MASKS = st.one_of(ONE_SIDED, SIZES.map(chunks), ONE_SIDED.map(lambda mask: ~mask), st.just(Mask()))


def test_pictures():
    assert dense(causal() & window(2), 4).astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]
    assert dense(prefix(2), 3).astype(int).tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert dense(chunks(2), 4).astype(int).tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
    ]
    assert dense(causal() & sinks(1) & ~window(2), 3).astype(int).tolist() == [
        [0, 0, 0],
        [0, 0, 0],
        [1, 0, 0],
    ]


@settings(deadline=None, max_examples=50)
@given(MASKS, MASKS)
def test_and_is_intersection(a, b):
    np.testing.assert_array_equal(dense(a & b), dense(a) & dense(b))


@settings(deadline=None, max_examples=50)
@given(MASKS, MASKS)
def test_and_commutes_and_repeats_nothing(a, b):
    np.testing.assert_array_equal(dense(a & b), dense(b & a))
    assert a & a == a and hash(a & a) == hash(a)


@settings(deadline=None, max_examples=50)
@given(ONE_SIDED)
def test_not_is_complement_and_its_own_inverse(mask):
    np.testing.assert_array_equal(dense(~mask), ~dense(mask))
    assert ~~mask == mask


@settings(deadline=None, max_examples=50)
@given(MASKS, MASKS)
def test_reach_bounds_every_distance(a, b):
    mask = a & b
    below, above = mask.reach()
    query, key = np.nonzero(dense(mask))
    assert below is None or (below <= 0 and (key - query >= below).all())
    assert above is None or (above >= 0 and (key - query <= above).all())


def test_reach_of_a_sliding_window():
    assert (causal() & window(4)).reach() == (-3, 0)
    assert Mask().reach() == (None, None)


def test_segments_are_walls_and_padding_is_unseen():
    where = context(5, [1, 1, 2, 0, 0])
    shown = np.asarray(visible(Mask(), where, where))[0].astype(int)
    assert shown.tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0] * 5, [0] * 5]


def test_complements_that_are_no_intervals_are_refused():
    with pytest.raises(ValueError, match=r"write causal\(\) & ~window\(n\)"):
        ~(causal() & window(3))
    with pytest.raises(ValueError, match="not an interval"):
        ~chunks(3)
    with pytest.raises(ValueError, match="this one has 0"):
        ~Mask()


@pytest.mark.parametrize("make", [window, sinks, prefix, chunks])
def test_sizes_below_one_are_refused(make):
    with pytest.raises(ValueError, match=rf"{make.__name__}\(0\): the size must be at least 1"):
        make(0)
