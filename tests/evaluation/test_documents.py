"""Held-out documents: framing, cutting, and the budget of tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcm.evaluation.documents import (
    Document,
    EvaluationError,
    at_least,
    from_text_tokens,
    head,
    within_budget,
)

from .scorers import random_document


def sized(sizes) -> list[Document]:
    return [random_document(f"d{i}", size) for i, size in enumerate(sizes)]


def test_framing():
    document = from_text_tokens("a", [5, 6], bos=0, eos=1, text_bytes=2)
    assert document.tokens_N.tolist() == [0, 5, 6]
    assert document.targets_N.tolist() == [5, 6, 1]
    assert document.tokens_N.dtype == document.targets_N.dtype == np.int32


def test_empty_text_is_one_position():
    document = from_text_tokens("", [], bos=0, eos=1, text_bytes=0)
    assert (document.tokens_N.tolist(), document.targets_N.tolist()) == ([0], [1])


def test_head_counts_bytes_in_proportion():
    document = Document("a", np.arange(100), np.arange(100), 350)
    assert head(document, 40).text_bytes == 140
    assert len(head(document, 40).targets_N) == 40
    assert head(document, 100) is document


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(1, 64), st.data())
def test_budget_is_filled_breadth_first(sizes, span, data):
    budget = data.draw(st.integers(span, 2000))
    kept = within_budget(sized(sizes), span=span, max_tokens=budget, seed=3)
    taken = {d.name: len(d.tokens_N) for d in kept}
    total = sum(taken.values())
    assert total <= budget
    assert total == sum(sizes) or budget - total < span
    # nobody gives a second span while another has not given its first
    rounds = max(-(-n // span) for n in taken.values())
    for index, size in enumerate(sizes):
        assert taken.get(f"d{index}", 0) >= min(size, (rounds - 1) * span)
    assert [d.name for d in kept] == sorted(taken, key=lambda name: int(name[1:]))


def test_budget_draws_documents_by_seed():
    documents = sized([10] * 50)
    chosen = [
        [d.name for d in within_budget(documents, span=10, max_tokens=100, seed=seed)]
        for seed in (0, 0, 1)
    ]
    assert len(chosen[0]) == 10
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(within_budget(documents, span=10, max_tokens=None)) == 50


def test_too_short_names_the_longest():
    assert [len(d.tokens_N) for d in at_least(sized([10, 64, 150]), 64)] == [64, 128]
    with pytest.raises(EvaluationError, match=r"reaches 200 tokens.*'d1', has 150"):
        at_least(sized([10, 150, 64]), 200)
