"""Bins of position: nothing lost, nothing counted twice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcm.evaluation import bins
from lcm.evaluation.windows import window_positions

EDGES = {
    "linear": lambda length: bins.linear_edges(length, 10),
    "octave": bins.octave_edges,
    "geometric": lambda length: bins.geometric_edges(length, 1.15, through=[7]),
}


@pytest.mark.parametrize("kind", EDGES)
@given(length=st.integers(1, 3000))
def test_edges_run_from_0_to_the_length(kind, length):
    edges = EDGES[kind](length)
    assert edges[0] == 0 and edges[-1] == length
    assert (np.diff(edges) > 0).all()


def test_edges_by_hand():
    assert bins.octave_edges(12).tolist() == [0, 1, 2, 4, 8, 12]
    assert bins.octave_edges(8).tolist() == [0, 1, 2, 4, 8]
    assert bins.linear_edges(5, 10).tolist() == [0, 1, 2, 3, 4, 5]
    assert bins.linear_edges(25, 10).tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert 200 in bins.geometric_edges(1000, 1.15, through=[200])
    assert bins.geometric_edges(1000, 1.15, through=[2000])[-1] == 1000
    assert bins.labels([0, 1, 2, 4]) == ["0", "1", "2-3"]


@pytest.mark.parametrize("kind", EDGES)
@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    length=st.integers(1, 64),
    seed=st.integers(0, 99),
)
def test_bins_add_up_to_the_total_exactly(kind, sizes, length, seed):
    """Losses that are multiples of 1/64 add without rounding, so equality is exact."""
    rng = np.random.default_rng(seed)
    losses = [rng.integers(0, 640, size) / 64 for size in sizes]
    positions = [window_positions(size, length, length) for size in sizes]
    sums_DJ, counts_DJ = bins.bin_sums(losses, positions, EDGES[kind](length))
    assert sums_DJ.sum() == sum(loss.sum() for loss in losses)
    assert counts_DJ.sum() == sum(sizes)
    assert counts_DJ.sum(axis=1).tolist() == sizes


def test_bin_sums_by_hand_and_unscored_tokens():
    loss_N, position_N = np.array([1.0, 2.0, np.nan, 4.0]), np.array([0, 1, 2, 3])
    sums_DJ, counts_DJ = bins.bin_sums([loss_N], [position_N], np.array([0, 1, 4]))
    assert sums_DJ.tolist() == [[1.0, 6.0]]
    assert counts_DJ.tolist() == [[1, 2]]
