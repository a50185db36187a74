"""Packing: every (document, index) pair exactly once, in one piece of its own document."""

import collections
import itertools

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm.data import packing, tokenizers
from lcm.data.documents import Document
from lcm.errors import ConfigError

PACKERS = sorted(packing.PACKERS)


def test_encode_by_hand():
    pairs = packing.encode(Document("d", "abc"), tokenizers.load("bytes"), countdown=True)
    assert pairs.dtype == np.int32
    assert pairs.tolist() == [[256, 97, 3], [97, 98, 2], [98, 99, 1], [99, 256, 0]]
    empty = packing.encode(Document("d", ""), tokenizers.load("bytes"), countdown=True)
    assert empty.tolist() == [[256, 256, 0]]


def packed(sizes, method, length, batch_size, bins, countdown=True):
    """Batches of documents with tokens 1000 * document + index, and their negatives as targets."""

    def document(number):
        tokens = 1000 * (number + 1) + np.arange(sizes[number], dtype=np.int32)
        left = np.arange(sizes[number] - 1, -1, -1, dtype=np.int32)
        return np.stack([tokens, -tokens, left][: 3 if countdown else 2], axis=-1)

    documents = grain.MapDataset.range(len(sizes)).map(document).to_iter_dataset()
    if method == "concat":
        bins = 64  # only a window to shuffle, and grain is slow at shuffling small ones
    rows = packing.packer(method)(documents, length, bins, 7)
    return list(packing.batch(rows, batch_size))


def pieces(batch, row):
    """Token runs of one row, by segment, in order."""
    segments = batch.context.segments_BL[row]
    for segment in range(1, segments.max() + 1):
        yield np.flatnonzero(segments == segment)


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    method=st.sampled_from(PACKERS),
    length=st.integers(1, 9),
    batch_size=st.integers(1, 4),
    bins=st.integers(1, 5),
)
def test_every_pair_exactly_once(data, method, length, batch_size, bins):
    # A document of 0 to 5 * length tokens has one pair more.
    sizes = data.draw(st.lists(st.integers(1, 5 * length + 1), min_size=1, max_size=12))
    seen = collections.Counter()
    for batch in packed(sizes, method, length, batch_size, bins):
        assert batch.tokens_BL.shape == (batch_size, length)
        real = batch.loss_weight_BL == 1
        np.testing.assert_array_equal(real, batch.context.segments_BL > 0)
        np.testing.assert_array_equal(batch.loss_weight_BL, real.astype(np.float32))
        np.testing.assert_array_equal(batch.targets_BL, -batch.tokens_BL)
        seen.update(batch.tokens_BL[real].tolist())
    expected = [1000 * (d + 1) + i for d, size in enumerate(sizes) for i in range(size)]
    assert seen == collections.Counter(expected)


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    method=st.sampled_from(PACKERS),
    length=st.integers(1, 9),
    bins=st.integers(1, 5),
)
def test_a_segment_is_a_run_of_one_document(data, method, length, bins):
    sizes = data.draw(st.lists(st.integers(1, 5 * length + 1), min_size=1, max_size=12))
    for batch in packed(sizes, method, length, 3, bins):
        for row in range(3):
            places = list(pieces(batch, row))
            flat = list(itertools.chain.from_iterable(places))
            assert flat == list(range(len(flat)))  # segments in order, padding only at the end
            for place in places:
                tokens = batch.tokens_BL[row, place]
                document, index = divmod(int(tokens[0]), 1000)
                run = np.arange(len(place))
                np.testing.assert_array_equal(tokens, tokens[0] + run)
                np.testing.assert_array_equal(batch.context.positions_BL[row, place], run)
                left = sizes[document - 1] - 1 - index
                np.testing.assert_array_equal(batch.context.remaining_BL[row, place], left - run)
            padding = batch.context.segments_BL[row] == 0
            assert (batch.context.remaining_BL[row, padding] == -1).all()
            assert not batch.tokens_BL[row, padding].any()


def test_concat_pads_only_the_last_row():
    batches = packed([5, 1, 17, 8, 3, 30], "concat", length=4, batch_size=2, bins=1)
    weights = np.concatenate([batch.loss_weight_BL.reshape(-1) for batch in batches])
    assert weights.tolist() == [1.0] * 64


@pytest.mark.parametrize("method", ["first_fit", "best_fit"])
def test_short_documents_stay_whole(method):
    sizes = [5, 3, 8, 2, 6, 7, 1, 4]
    batches = packed(sizes, method, length=8, batch_size=2, bins=4)
    whole = {len(place) for b in batches for row in range(2) for place in pieces(b, row)}
    assert whole == set(sizes)


def test_first_and_best_fit_by_hand():
    """Sizes 5, 6, 3, 2 into two rows of 8: first fit puts 3 behind 5, best fit 2 behind 6."""

    def rows(method, sizes):
        (batch,) = packed(sizes, method, length=8, batch_size=2, bins=2)
        numbers = [
            [int(batch.tokens_BL[r, p[0]]) // 1000 for p in pieces(batch, r)] for r in (0, 1)
        ]
        return sorted(numbers)

    assert rows("first_fit", [5, 6, 2]) == [[1, 3], [2]]
    assert rows("best_fit", [5, 6, 2]) == [[1], [2, 3]]


@pytest.mark.parametrize("method", PACKERS)
def test_without_countdown_remaining_is_minus_one(method):
    for batch in packed([3, 9], method, length=4, batch_size=2, bins=2, countdown=False):
        assert (batch.context.remaining_BL == -1).all()
        dtypes = [x.dtype for x in jax.tree.leaves(batch._replace(loss_weight_BL=None))]
        assert dtypes == [np.int32] * 5 and batch.loss_weight_BL.dtype == np.float32


def test_unknown_packer():
    with pytest.raises(ConfigError, match="'tight' is unknown: use one of concat, first_fit"):
        packing.packer("tight")
