"""Position matrices rho(i, j) of remaps against the rows and bounds of their cards."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import context
from rho import of_paper, of_regions

from lcm import positions

PLAIN = of_paper(positions.ReRoPE(window=10_000), 41)
REMAPS = {
    "rerope": positions.ReRoPE(window=7),
    "leaky": positions.LeakyReRoPE(window=7, k=3.0),
    "self_extend": positions.SelfExtend(group=4, window=8),
    "self_extend, ragged": positions.SelfExtend(group=3, window=8),
    "dual_chunk": positions.DualChunk(chunk=5, local=3),
    "lm_infinite": positions.LMInfinite(window=9, sinks=3, cap=12),
    "streaming": positions.StreamingLLM(kept=9, sinks=3),
    "streaming, two": positions.StreamingLLM(kept=2, sinks=1),
}


@pytest.mark.parametrize("name", REMAPS)
def test_regions_are_the_papers_matrix(name):
    found, want = of_regions(REMAPS[name], 41), of_paper(REMAPS[name], 41)
    np.testing.assert_allclose(found, want, rtol=1e-6)  # NaN in the same places
    assert np.nanmin(found) == 0


def row(encoding, i):
    found = of_regions(encoding, i + 1)[i]
    assert not np.any(np.isnan(found))
    return " ".join(f"{x:g}" for x in found)


def test_rows_of_dual_chunk_attention():
    figure = positions.DualChunk(chunk=5, local=3)
    assert row(figure, 8) == "7 6 5 4 3 3 2 1 0"
    assert row(figure, 9) == "7 6 5 4 3 4 3 2 1 0"
    assert row(figure, 10) == "7 6 5 4 3 5 4 3 2 1 0"
    assert row(figure, 13) == "7 6 5 4 3 7 6 5 4 3 3 2 1 0"
    for n in (20, 200):
        assert np.nanmax(of_regions(figure, n)) == 7


def test_dual_chunk_attention_is_exact_nearby():
    for chunk, local in ((16, 5), (64, 20)):
        found = of_regions(positions.DualChunk(chunk=chunk, local=local), 41)
        near = np.less_equal(PLAIN, local)
        np.testing.assert_array_equal(found[near], PLAIN[near])
    np.testing.assert_array_equal(found, PLAIN)  # one chunk holds all


def test_dual_chunks_default_is_chunkllamas():
    dims = positions.Dims(16, 1, 1, 16, 4096)
    found = positions.DualChunk().resolved(dims)
    assert (found.chunk, found.local) == (2560, 512)


def test_rows_of_self_extend():
    small = positions.SelfExtend(group=2, window=4)
    assert row(small, 5) == "4 4 3 2 1 0"
    assert row(small, 6) == "5 5 4 3 2 1 0"


def test_self_extend_within_its_window_and_in_groups_of_one():
    for group, window in ((4, 64), (1, 8)):
        encoding = positions.SelfExtend(group=group, window=window)
        np.testing.assert_array_equal(of_regions(encoding, 41), PLAIN)


@pytest.mark.parametrize(("group", "window"), [(4, 8), (8, 8), (3, 8)])
def test_reach_of_self_extend(group, window):
    for n in (9, 30, 41):
        rho = of_regions(positions.SelfExtend(group=group, window=window), n)
        assert np.nanmax(rho) <= (n - 1) // group + window - window // group
        assert np.all(np.diff(rho[-1]) <= 0)


def test_rerope_and_its_leaky_form():
    np.testing.assert_array_equal(of_regions(positions.ReRoPE(window=41), 41), PLAIN)
    np.testing.assert_allclose(
        of_regions(positions.LeakyReRoPE(window=7, k=1.0), 41), PLAIN, atol=1e-5
    )
    np.testing.assert_allclose(
        of_regions(positions.LeakyReRoPE(window=7, k=1e9), 41),
        of_regions(positions.ReRoPE(window=7), 41),
        atol=1e-5,
    )
    at_the_window = of_regions(positions.LeakyReRoPE(window=7, k=4.0), 41)[-1][::-1][6:9]
    np.testing.assert_allclose(at_the_window, [6, 7, 7.25], atol=1e-5)  # continuous


def test_lm_infinite_counts_its_window_with_the_query():
    rho = of_regions(positions.LMInfinite(window=9, sinks=3, cap=9), 41)
    seen = ~np.isnan(rho)
    i, j = np.arange(41)[:, None], np.arange(41)
    np.testing.assert_array_equal(seen, (j <= i) & ((i - j < 9) | (j < 3)))
    assert np.nanmax(rho) == 9
    np.testing.assert_array_equal(rho[:9, :9], PLAIN[:9, :9])


def test_streaming_differs_from_lm_infinite_in_the_sinks_alone():
    stream = of_regions(positions.StreamingLLM(kept=12, sinks=3), 41)
    infinite = of_regions(positions.LMInfinite(window=9, sinks=3, cap=9), 41)
    np.testing.assert_array_equal(np.isnan(stream), np.isnan(infinite))
    np.testing.assert_array_equal(stream[:, 3:], infinite[:, 3:])
    assert stream[40, :3].tolist() == [11, 10, 9] and infinite[40, :3].tolist() == [9, 9, 9]
    np.testing.assert_array_equal(stream[:12], PLAIN[:12])  # as long as nothing is evicted
    assert np.nanmax(stream) == 11  # positions of the cache, whatever was evicted


def test_scores_of_lm_infinite_alibi():
    encoding = positions.LMInfiniteALiBi(window=9, sinks=3, cap=12)
    zero = jnp.zeros((1, 41, 2, 8))
    parts = encoding.parts({}, zero, zero, context(41), context(41))
    i, j = jnp.arange(41)[:, None], jnp.arange(41)
    for part in parts:
        bias = part.score_mod(jnp.zeros((41, 41)), i, j, jnp.asarray(1))
        seen = np.asarray(part.mask.shows(i, j))
        want = -(2.0**-8) * np.minimum(i - j, 12)  # the second of two heads
        np.testing.assert_allclose(bias[seen], want[seen], rtol=1e-6)
