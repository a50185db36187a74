"""What is kept up to date token by token against what is counted anew; rows come and go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm.decoding import Sampling, begin, chain, insert, keys, plan, take

from .rows import CAPACITY, watch

VOCAB = 6
WINDOWS = (None, 0, 1, 3, 7, 200)
SETTINGS = [
    Sampling(repetition_penalty=1.2, repetition_window=window, presence_penalty=0.1, stop_ids=(2,))
    for window in WINDOWS
]


def counts(tokens):
    return np.bincount(np.asarray(tokens, int), minlength=VOCAB)


@pytest.mark.parametrize("ngrams", [False, True], ids=["window", "everything remembered"])
def test_counts_are_those_counted_anew(ngrams):
    """For windows shorter and longer than prompts, with rows that pause."""
    settings = [*SETTINGS, Sampling(no_repeat_ngram=2)] if ngrams else SETTINGS
    rng = np.random.default_rng(0)
    shape = plan(settings, VOCAB, CAPACITY)
    assert shape.ring == (CAPACITY if ngrams else 7)
    prompts = [rng.integers(0, VOCAB, size).tolist() for size in (5, 0, 9, 2, 20, 4, 1)]
    written = [[] for _ in SETTINGS]
    history = begin(settings, prompts[: len(settings)], shape)
    for _ in range(30):
        tokens, active = rng.integers(0, VOCAB, len(settings)), rng.random(len(settings)) < 0.7
        history = jax.device_get(watch(history, tokens, active))
        for row, window in enumerate(WINDOWS):
            if active[row]:
                written[row].append(int(tokens[row]))
            so_far = prompts[row] + written[row]
            inside = so_far if window is None else so_far[max(0, len(so_far) - window) :]
            np.testing.assert_array_equal(history.seen_RV[row], counts(inside))
            np.testing.assert_array_equal(history.written_RV[row], counts(written[row]))
            assert history.length_R[row] == len(so_far) and history.new_R[row] == len(written[row])
            for place in range(max(0, len(so_far) - shape.ring), len(so_far)):
                assert history.recent_RW[row, place % shape.ring] == so_far[place]


def test_nothing_is_kept_that_nothing_reads():
    history = begin([Sampling(stop_ids=(1,))], [[1, 2]], plan([Sampling()], VOCAB, CAPACITY))
    history = watch(history, jnp.array([3]), jnp.array([True]))
    assert history.seen_RV is history.written_RV is history.stops_RV is None
    assert history.recent_RW.shape == (1, 0) and history.length_R[0] == 3


def test_a_row_is_replaced_by_another():
    """As if it had been there from the beginning; the others, and the program, stay."""
    other = Sampling(repetition_penalty=1.9, repetition_window=2, seed=9)
    shape = plan([*SETTINGS, other], VOCAB, CAPACITY)
    prompts = [[row] * row for row in range(len(SETTINGS))]
    make = lambda settings, prompts: (  # noqa: E731
        begin(settings, prompts, shape),
        chain(settings, shape),
        keys(settings, shape),
    )
    put = jax.jit(insert)
    for row in (4, 1):
        rows, want_settings, want_prompts = make(SETTINGS, prompts), [*SETTINGS], [*prompts]
        want_settings[row], want_prompts[row] = other, [1, 2, 1, 2, 5]
        got = put(rows, row, make([other], [[1, 2, 1, 2, 5]]))
        want = make(want_settings, want_prompts)
        jax.tree.map(np.testing.assert_array_equal, got[:2], want[:2])
        assert jnp.array_equal(got[2], want[2])
    assert put._cache_size() == 1


def test_rows_are_taken_in_another_order():
    shape = plan(SETTINGS, VOCAB, CAPACITY)
    history = begin(SETTINGS, [[row] * row for row in range(len(SETTINGS))], shape)
    beams = take(history, jnp.array([2, 2, 5]))
    np.testing.assert_array_equal(beams.length_R, [2, 2, 5])
    np.testing.assert_array_equal(beams.seen_RV, np.asarray(history.seen_RV)[[2, 2, 5]])


def test_a_row_that_was_not_planned_for_is_refused():
    shape = plan([Sampling(top_k=3, temperature=0)], VOCAB, CAPACITY)
    for settings in (Sampling(), Sampling(temperature=0, no_repeat_ngram=2)):
        with pytest.raises(ValueError, match="made of every row"):
            chain([settings], shape)
