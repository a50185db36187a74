"""A `data` section for tests, and text of several scripts."""

import types
from collections.abc import Callable

import pytest

from lcm.data import defaults

TEXT = "the quick brown fox jumps over the lazy dog, naïve café, 日本語 and 🎉\n"


@pytest.fixture
def data() -> Callable[..., types.SimpleNamespace]:
    def make(**changes: object) -> types.SimpleNamespace:
        values = {key: value for key, (value, _) in defaults().items()}
        assert changes.keys() <= values.keys()
        # grain shuffles few rows at a time slowly: its cipher has 2^16 places to walk through.
        return types.SimpleNamespace(**values | {"packing_bins": 64} | changes)

    return make


@pytest.fixture
def corpus(tmp_path) -> str:
    """A glob over 23 text files of 0 to 1100 characters; some of them are held out."""
    for number in range(23):
        text = (f"{number} " + TEXT * 20)[: number * 50]
        (tmp_path / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return str(tmp_path / "*.txt")
