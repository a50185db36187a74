"""Windows: every token scored once, with the context promised, in batches of one shape."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcm.errors import ConfigError
from lcm.evaluation.documents import EvaluationError
from lcm.evaluation.windows import (
    batches,
    cut,
    cut_suffixes,
    planned_tokens,
    token_losses,
    window_positions,
)

from . import scorers
from .scorers import random_document


def documents(sizes):
    return [random_document(f"d{i}", size, seed=i) for i, size in enumerate(sizes)]


def score_all(score, sizes, length, stride, batch_tokens=64):
    docs = documents(sizes)
    return token_losses(score, docs, cut(sizes, length, stride), batch_tokens=batch_tokens)


sizes_length_stride = st.integers(1, 40).flatmap(
    lambda length: st.tuples(
        st.lists(st.integers(1, 150), min_size=1, max_size=5),
        st.just(length),
        st.integers(1, length),
    )
)


@given(sizes_length_stride, st.integers(1, 5))
def test_every_token_is_scored_exactly_once(case, rows):
    sizes, length, stride = case
    docs, plan = documents(sizes), cut(sizes, length, stride)
    times = [np.zeros(size, int) for size in sizes]
    for windows, batch in batches(docs, plan, rows):
        assert batch.tokens_BL.shape == (rows, length)
        for row, window in enumerate(windows):
            start, size = plan.start_W[window], plan.end_W[window] - plan.start_W[window]
            assert batch.context.segments_BL[row].tolist() == [1] * size + [0] * (length - size)
            assert batch.context.positions_BL[row, :size].tolist() == list(range(size))
            for column in np.flatnonzero(batch.loss_weight_BL[row]):
                document = docs[plan.document_W[window]]
                assert batch.tokens_BL[row, column] == document.tokens_N[start + column]
                assert batch.targets_BL[row, column] == document.targets_N[start + column]
                times[plan.document_W[window]][start + column] += 1
        padding = batch.context.segments_BL == 0
        assert not batch.loss_weight_BL[padding].any()
        assert padding[len(windows) :].all()
        assert (batch.context.remaining_BL == -1).all()
    assert all((t == 1).all() for t in times)


@given(sizes_length_stride)
def test_tokens_stand_where_window_positions_says(case):
    sizes, length, stride = case
    losses = score_all(scorers.by_position(lambda p: p), sizes, length, stride)
    for size, loss_N in zip(sizes, losses, strict=True):
        np.testing.assert_array_equal(loss_N, window_positions(size, length, stride))
        assert (loss_N[length:] >= length - stride).all()


@given(sizes_length_stride)
def test_a_bigram_does_not_see_windows(case):
    sizes, length, stride = case
    table = scorers.bigram_table()
    for document, loss_N in zip(
        documents(sizes), score_all(scorers.bigram(table), sizes, length, stride), strict=True
    ):
        np.testing.assert_array_equal(loss_N, table[document.tokens_N, document.targets_N])


def test_a_reach_within_the_overlap_gives_the_exact_value():
    """A window of 24 that moves 8 keeps 16 tokens of context: enough for a reach of 17."""
    whole = score_all(scorers.local(17), [120], 120, 120)[0]
    np.testing.assert_allclose(score_all(scorers.local(17), [120], 24, 8)[0], whole, rtol=1e-6)
    assert np.abs(score_all(scorers.local(18), [120], 24, 8)[0] - whole).max() > 0.1
    assert np.abs(score_all(scorers.local(17), [120], 24, 24)[0] - whole).max() > 0.1


def test_suffixes_score_the_same_tokens_at_every_context():
    sizes, scored = [100, 64, 31], {}
    for context in (0, 8, 24):
        plan = cut_suffixes(sizes, span=32, suffix=8, context=context)
        assert plan.length == context + 8
        losses = token_losses(
            scorers.by_position(lambda p: p), documents(sizes), plan, batch_tokens=100
        )
        scored[context] = [np.flatnonzero(~np.isnan(loss)).tolist() for loss in losses]
        assert np.nanmin(np.concatenate(losses)) == context
    assert scored[0] == scored[8] == scored[24]
    assert scored[0][1] == [*range(24, 32), *range(56, 64)]
    assert scored[0][2] == []
    with pytest.raises(ConfigError, match="do not fit"):
        cut_suffixes(sizes, span=32, suffix=8, context=25)


@pytest.mark.parametrize("stride", [0, 9])
def test_stride_out_of_range(stride):
    with pytest.raises(ConfigError, match=f"stride {stride} .* 8"):
        cut([10], 8, stride)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_named(bad):
    """Token 21 of d1 is position 5 of its third window of 8; padding and context may be nan."""

    def score(batch):
        nll = np.where(batch.loss_weight_BL > 0, 1.0, np.nan)
        is_it = (batch.tokens_BL == special) & (batch.loss_weight_BL > 0)
        return np.where(is_it, bad, nll).astype(np.float32)

    docs, special = documents([30, 30]), 99
    docs[1].tokens_N[21] = special
    with pytest.raises(EvaluationError, match=r"token 21 of document 'd1'.*position 5 of .* 8"):
        token_losses(score, docs, cut([30, 30], 8, 8), batch_tokens=16)


def test_a_scorer_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 7\).*\(1, 8\)"):
        score_all(lambda batch: np.zeros((1, 7)), [8], 8, 8, batch_tokens=8)


@pytest.mark.parametrize(("rows", "shape"), [(1, (4, 16)), (3, (3, 16)), (5, (5, 16))])
def test_jax_scorers_one_shape_per_length_and_all_progress_told(rows, shape):
    shapes, told = set(), []

    def score(batch):
        shapes.add(batch.tokens_BL.shape)
        return jnp.ones(batch.tokens_BL.shape, jnp.float32)

    plan = cut([100, 30, 7], 16, 4)
    many = {"batch_tokens": 70, "rows": rows}
    losses = token_losses(score, documents([100, 30, 7]), plan, **many, advance=told.append)
    assert shapes == {shape}
    assert sum(told) == planned_tokens(plan, 70, rows)
    assert all((loss == 1).all() for loss in losses)
