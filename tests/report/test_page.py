"""The page: self-contained, escaped, complete, and opened once in a real browser."""

import base64
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib.image
import pytest

from lcm.report import page
from lcm.report.runs import ReportError
from lcm.report.tables import Table

from .workdirs import make

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PNG = "data:image/png;base64,"
EVIL = '<script>alert("&")</script>'


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        make(folder / "rope", climb=3.0, steps=200),
        make(folder / "<img src=x onerror=1>", encoding=EVIL, steps=200),
    ]


@pytest.fixture(scope="module")
def written(workdirs, tmp_path_factory):
    return page.write(
        workdirs,
        tmp_path_factory.mktemp("out") / "deep" / "report.html",
        title=f"Title {EVIL}",
        sections=[
            page.Section(f"Extra {EVIL}", ["words"], [Table(EVIL, ["a", "b"], [[EVIL, "1"]])])
        ],
        published=[page.Published("perplexity", "18.40", "19.1 ± 0.2", f"arXiv {EVIL}")],
        command=f"lcm report 'a b' {EVIL}",
    )


class Outline(HTMLParser):
    """Tags with their attributes, and the text of headings."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.headings, self._in_heading = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_heading = tag in ("h1", "h2")

    def handle_data(self, data):
        if self._in_heading:
            self.headings.append(data)
            self._in_heading = False


def test_nothing_is_fetched_and_nothing_runs(written):
    text = written.read_text(encoding="utf-8")
    outline = Outline(text)
    assert {tag for tag, _ in outline.tags} & {"script", "link", "iframe", "object"} == set()
    for _, attributes in outline.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert "href" not in attributes
        assert attributes.get("src", PNG).startswith(PNG)
    assert "@import" not in text and "url(" not in text
    assert text.count(EVIL) == 0


def test_every_section_is_there(written):
    assert Outline(written.read_text()).headings == [
        f"Title {EVIL}",
        f"Extra {EVIL}",
        "Published and measured",
        "Loss against length",
        "Loss by position",
        "Loss by available context",
        "Perplexity",
        "Training",
        "Configuration",
        "How this page was made",
    ]


def test_pictures_are_inside_and_beside_with_alternatives(written):
    text = written.read_text()
    inside = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)\"", text)]
    beside = {path.name: path.read_bytes() for path in written.parent.glob("*.png")}
    assert set(beside) == {
        "report-length-curve.png",
        "report-loss-by-position.png",
        "report-loss-by-context.png",
        "report-training.png",
        "report-training-positions.png",
    }
    assert sorted(inside) == sorted(beside.values())
    images = [attributes for tag, attributes in Outline(text).tags if tag == "img"]
    assert all(len(image["alt"]) > 40 for image in images)


def test_accessible_structure(written):
    tags = Outline(written.read_text()).tags
    count = [tag for tag, _ in tags].count
    assert dict(tags)["html"] == {"lang": "en"}
    assert count("main") == count("h1") == count("title") == 1
    assert count("table") == count("caption") == count("thead") >= 8
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in tags if tag == "th")


def test_the_page_tells_how_it_was_made(written, workdirs):
    text = written.read_text()
    assert "Command: lcm report &#x27;a b&#x27; &lt;script&gt;" in text
    assert all(
        str(path.name).replace("<", "&lt;").replace(">", "&gt;") in text for path in workdirs
    )
    for package in ("python", "numpy", "jax", "matplotlib"):
        assert f'<th scope="row">{package}</th>' in text
    assert "18.40" in text and "19.1 ± 0.2" in text
    assert "model.positions" in text and "model.depth" not in text


def test_runs_without_an_evaluation_or_without_metrics(tmp_path):
    trained = make(tmp_path / "trained", steps=20, evaluated=False)
    evaluated = make(tmp_path / "evaluated", steps=1)
    (evaluated / "metrics.jsonl").unlink()
    for workdirs, headings in (
        ([trained], ["Training"]),
        ([evaluated], ["Loss against length"]),
        ([trained, evaluated], ["Training", "Loss against length"]),
    ):
        out = page.write(workdirs, tmp_path)
        assert out == tmp_path / "report.html"
        assert set(headings) <= set(Outline(out.read_text()).headings)
    assert "no metrics.jsonl" in out.read_text()


def test_no_multiples_beyond_one(tmp_path):
    workdir = make(tmp_path / "short", steps=3, multiples=(1,))
    assert "Excess" not in page.write([workdir], tmp_path / "r.html").read_text()


def test_unwritable_out(workdirs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot write the report"):
        page.write(workdirs[:1], tmp_path / "file" / "report.html")


def test_reports_load_neither_jax_nor_matplotlib_when_imported():
    check = "import sys, lcm.report.page; sys.exit(bool({'jax', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: the page was NOT opened")
def test_chromium_shows_the_page_with_its_plots(written, tmp_path):
    """The plots' own colours are on the screen; images that did not load would leave none."""
    shot = tmp_path / "shot.png"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=1100,5600", f"--screenshot={shot}", written.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    pixels = (matplotlib.image.imread(shot)[..., :3] * 255).round().astype(int)
    assert pixels.shape[1] == 1100
    rows = []
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # of the first and the second run
        at = (abs(pixels - colour) <= 3).all(axis=2)
        assert at.sum() > 4000
        rows.append(at.any(axis=1).nonzero()[0])
    assert all(row[-1] - row[0] > 2000 for row in rows)  # in the first plot and in the last
