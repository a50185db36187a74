"""The held-out split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcm.data.documents import Document, draw, is_heldout, take_split
from lcm.errors import ConfigError, DataError


class Named:
    def __init__(self, names):
        self.names = list(names)
        self.read = 0

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return self.names[index]

    def __getitem__(self, index):
        self.read += 1
        return Document(self.names[index], f"text of {self.names[index]}")


@pytest.mark.parametrize(
    "name, digest",
    [
        ("29", "08ae625d151b8dd1"),
        ("json/decoder.py", "1d2b2a9a82b8610d"),
        ("é", "cb1abf8beff3192f"),
    ],
)
def test_draw_is_a_hash_others_compute(name, digest):
    """`printf %s NAME | b2sum -l 64`; another hash would let documents trained on be held out."""
    share = int(digest, 16) / 2**64
    assert draw(name) == pytest.approx(share, abs=2**-53)
    assert is_heldout(name, share + 1e-9) and not is_heldout(name, share - 1e-9)


def test_share_is_the_fraction():
    held = np.mean([is_heldout(f"document {i}", 0.2) for i in range(20_000)])
    assert abs(held - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 20_000)  # four standard errors


@given(st.sets(st.text(), min_size=1), st.sets(st.text()), st.floats(0.0, 1.0))
def test_adding_documents_moves_none(names, more, fraction):
    def sides(names):
        found = {}
        for side in ("train", "heldout"):
            try:
                found |= {d.name: side for d in take_split(Named(names), fraction, side)}
            except DataError:
                assert all(is_heldout(n, fraction) == (side == "train") for n in names)
        return found

    before, after = sides(names), sides(names | more)
    assert before.keys() == names  # every document is on a side
    assert all(after[name] == side for name, side in before.items())


def test_subset_reads_lazily_and_slices():
    source = Named(map(str, range(200)))
    held = take_split(source, 0.3, "heldout")
    assert source.read == 0
    assert [d.name for d in held[2:4]] == [held[2].name, held[3].name]
    assert source.read == 4
    assert {d.name for d in held} == {n for n in source.names if is_heldout(n, 0.3)}


@pytest.mark.parametrize("split, fraction", [("heldout", 0.0), ("train", 1.0)])
def test_empty_split_is_refused_with_a_share_that_works(split, fraction):
    source = Named(["a", "b", "c", "d"])
    with pytest.raises(DataError, match=rf"the {split} split is empty.*data\.heldout=") as caught:
        take_split(source, fraction, split)
    advised = float(str(caught.value).rsplit("=", 1)[1])
    sizes = [len(take_split(source, advised, side)) for side in ("train", "heldout")]
    assert sizes == ([3, 1] if split == "heldout" else [1, 3])


def test_one_document_cannot_be_split():
    with pytest.raises(DataError, match=r"1 document.*data\.heldout=0"):
        take_split(Named(["only"]), 0.05, "heldout")


def test_unknown_split():
    with pytest.raises(ConfigError, match=r"'test'.*'heldout'"):
        take_split(Named("ab"), 0.5, "test")
