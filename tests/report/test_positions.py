"""The reference of encodings: complete, true to what encodings do, and one page."""

import base64
import io
import pathlib
import re
import sys

import matplotlib.image
import numpy as np
import pytest

from lcm import cli, positions
from lcm.errors import ConfigError
from lcm.positions import Dims
from lcm.report import positions as reference
from lcm.report import probes

sys.path.append(str(pathlib.Path(__file__).parents[1] / "positions"))  # its cases
from cases import FIELDS
from rho import PAPERS, of_paper

SMALL = Dims(width=16, heads=2, kv_heads=2, head_size=8, length=8)
LENGTH = 24


@pytest.fixture
def small(monkeypatch):
    """Pictures of 24 tokens, with the fields that make sense there."""
    monkeypatch.setattr(reference, "EXAMPLES", FIELDS)


def test_table_has_every_encoding_and_column():
    table = reference.table()
    assert [row[0] for row in table.rows] == [n for n in positions.ENCODINGS if n != "chain"]
    by_name = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert by_name["t5"]["parameters"] == "table [32, H] shared"
    assert by_name["clex"]["parameters"] == "down [K, K/2] shared, up [K/2, K] shared"
    assert by_name["kerple"]["parameters"] == "a [H] in each layer, p [H] in each layer"
    assert by_name["learned"]["parameters"] == "table [L, D] shared"
    assert by_name["rope"]["parameters"] == "none"
    assert by_name["rope"]["fields"] == "base=10000.0, fraction=1.0, interleaved=False"
    assert by_name["rerope"]["fields"] == "rope=rope, window=512"
    assert by_name["clex"]["cache holds"] == "keys before rotation"
    assert by_name["yarn"]["needs training"] == "none"
    assert all(cell for row in table.rows for cell in row)


def test_command_prints_the_table_and_entries(capsys):
    assert cli.main(["positions"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 + len(positions.ENCODINGS) - 1
    assert max(map(len, lines)) < 130
    assert cli.main(["positions", "log_n+clex"]) == 0
    out = capsys.readouterr().out
    assert "log_n: log-n" in out and "clex: CLEX" in out
    assert "activation=tanh" in out and "steps: of the solver for each unit of t" in out
    assert cli.main(["positions", "roep"]) == 2
    assert "'roep' is unknown: choose from nope, learned" in capsys.readouterr().err
    assert cli.main(["positions", "chain"]) == 0


@pytest.mark.quick("nope", "rope", "clex", "dual_chunk", "fire", "log_n")
@pytest.mark.parametrize("name", [n for n in positions.ENCODINGS if n != "chain"])
def test_pictures_of_every_encoding(name, small):
    section = reference.section(name, SMALL, LENGTH)
    (picture,) = section.pictures
    assert section.text and section.tables[0].rows
    assert picture.alt and picture.caption.startswith(("Distance", "Score", "Cos"))
    image = matplotlib.image.imread(io.BytesIO(picture.png))
    assert image[..., :3].std() > 0.01  # something is drawn


MAPS = [name for name, kind in positions.ENCODINGS.items() if kind.__name__ in PAPERS]


@pytest.mark.parametrize("name", MAPS)
def test_maps_are_the_distances_of_the_papers(name, small):
    """Read from the outputs of attention, by nothing but their angle."""
    encoding, _ = reference.example(name, SMALL)
    found = probes.probe(encoding, SMALL, LENGTH).rho
    np.testing.assert_allclose(found, of_paper(encoding, LENGTH), atol=0.02)


def test_decay_is_the_score(small):
    encoding, _ = reference.example("alibi", SMALL)
    found = probes.probe(encoding, SMALL, LENGTH).scores
    slopes = positions.alibi.slopes(2)
    want = -np.outer(slopes, np.arange(LENGTH)[::-1])
    np.testing.assert_allclose(found, want, atol=1e-4)
    encoding, _ = reference.example("rope", SMALL)
    theta = np.asarray(encoding.frequencies(8)[0], np.float64)
    distance = np.arange(LENGTH)[::-1, None]
    want = 2 * (np.cos(distance * theta) - 1).sum(-1) / 8**0.5
    found = probes.probe(encoding, SMALL, LENGTH).scores
    np.testing.assert_allclose(found, np.tile(want, (2, 1)), atol=1e-4)
    encoding, label = reference.example("chunked", SMALL)
    assert label == "chunked, size=5, joined with rope"
    found = probes.probe(encoding, SMALL, LENGTH).scores
    np.testing.assert_array_equal(np.isfinite(found[0]), np.arange(LENGTH) >= 20)


def test_page_stands_alone(tmp_path, small, monkeypatch):
    monkeypatch.setattr(reference, "names", lambda of="": ["rope", "rerope", "learned"])
    out = reference.write(tmp_path / "deep" / "positions.html", dims=SMALL, length=LENGTH)
    text = out.read_text(encoding="utf-8")
    # "://" and "href=", since the letters alone may be those of a picture.
    assert "<script" not in text and "href=" not in text and "://" not in text
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "All encodings",
        "rope: RoPE",
        "rerope: ReRoPE",
        "learned: learned",
    ]
    pictures = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    assert len(pictures) == 3
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    with pytest.raises(ConfigError, match="cannot write the page"):
        reference.write(tmp_path)
