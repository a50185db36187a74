"""Ranking passages: BM25 against its formula, ranks, and pairs from sources."""

import math

import numpy as np
import pytest

from lcm.data.descriptions import EOS, PAD, descriptions, rows, words
from lcm.data.documents import Document
from lcm.errors import ConfigError
from lcm.evaluation.retrieval import BM25, ranks, recall, reciprocal_rank

PASSAGES = [["a", "b", "a"], ["b", "c"], ["d"]]


def test_bm25_is_its_formula():
    got = BM25(PASSAGES, k1=1.2, b=0.75).scores(["a", "b", "z"])
    rare, common = math.log(1 + 2.5 / 1.5), math.log(1 + 1.5 / 2.5)
    scale = [1.2 * (0.25 + 0.75 * n / 2) for n in (3, 2, 1)]
    want = [
        rare * 2 * 2.2 / (2 + scale[0]) + common * 2.2 / (1 + scale[0]),
        common * 2.2 / (1 + scale[1]),
        0,
    ]
    np.testing.assert_allclose(got, want)
    np.testing.assert_allclose(BM25(PASSAGES).scores(["d", "d"]), 2 * BM25(PASSAGES).scores(["d"]))
    with pytest.raises(ValueError, match="2 passages without a word"):
        BM25([[], []])


def test_ranks_and_what_is_made_of_them():
    scores = np.array([[3.0, 2, 1, 0], [3, 2, 1, 0], [1, 1, 1, 1], [0, 5, 5, 5]])
    got = ranks(scores, np.array([0, 3, 1, 1]))
    assert got.tolist() == [1, 4, 2.5, 2]
    assert [recall(got, k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1]
    assert reciprocal_rank(got, 3) == pytest.approx((1 + 0 + 1 / 2.5 + 1 / 2) / 4)


class Sources(list):
    """A list of documents as a source."""

    def name(self, index):
        return self[index].name


CODE = '''
def read_line(file, size):
    """Read one whole line of it.

    More of it.
    """
    chunk = file.read(size)
    return chunk.splitlines()

class A:
    def readLine(self, file, size):
        """Read one whole
        line of it."""
        return file.read(size)

def empty():
    """Nothing but what is said here."""
'''


def test_descriptions_have_no_docstring_in_their_passage():
    found = list(descriptions(Sources([Document("m.py", CODE), Document("broken.py", "def (")])))
    assert [(pair.name, pair.query) for pair in found] == [
        ("m.py:read_line:2", "Read one whole line of it.")  # the second says the same
    ]
    said = found[0].passage
    assert said.startswith("def read_line(file, size):\n    chunk") and "More of it" not in said
    topic = Document("topics/x", "The one of four words\n*****\n\nWhat stands below it, then.\n")
    (pair,) = descriptions(Sources([topic]))
    assert pair[1:] == ("The one of four words", "What stands below it, then.")


def test_words_of_identifiers_are_apart():
    assert words("readLine read_line HTTPServer2 x") == [
        *("read", "line", "read", "line", "http", "server", "2", "x"),
    ]


def test_rows_end_in_eos_whatever_is_cut():
    tokens, count = rows([["a", "b", "c", "d"], ["a"], []], vocabulary=50, length=3)
    assert tokens[:, 0].tolist()[:2] == [tokens[0, 0]] * 2 and count.tolist() == [3, 2, 1]
    assert tokens[0, 2] == EOS and tokens[1, 1:].tolist() == [EOS, PAD] and tokens[2, 0] == EOS
    assert tokens[0, :2].min() >= 2 and tokens.max() < 50
    with pytest.raises(ConfigError, match="vocabulary=2"):
        rows([["a"]], vocabulary=2, length=3)
