"""Tables: the figures of the evaluations, formatted; text and HTML."""

import pytest

from lcm.report import runs, tables
from lcm.report.tables import Table

from .workdirs import held_out, make


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return runs.read_all(
        [
            make(folder / "rope", climb=3.0, steps=20),
            make(folder / "alibi", encoding="alibi", steps=20),
        ]
    )


def cell(table, row, column):
    return dict(zip(table.header, table.rows[row], strict=True))[column]


def test_intervals_and_missing_values():
    assert tables.interval({"value": 1.4823, "low": 1.45, "high": 1.52}) == "1.482 ± 0.035"
    assert tables.interval({"value": 1.4823, "low": None, "high": None}) == "1.482"
    assert tables.interval({"value": None, "low": None, "high": None}) == "–"
    assert tables.interval(None) == "–"
    assert tables.number(12345.678, 1) == "12,345.7"


def test_seeds_are_averaged_and_told_how_far_apart_they_lie():
    seeds = [0.5, 1.0], [0.75, 0.25], [1.0, 0.25]
    assert tables.over_seeds(seeds, 2) == ["0.75", "0.50", "0.75"]
    assert tables.over_seeds(seeds[:1], 1) == ["0.5", "1.0", tables.MISSING]


def test_effective_lengths():
    entry = {"value": 512, "low": 256, "high": 1024, "longest_tested": False, "lengths": [256]}
    assert tables.effective_length(entry) == "512 (256 to 1,024)"
    assert tables.effective_length(entry | {"low": 512, "high": 512}) == "512"
    assert tables.effective_length(entry | {"low": None, "high": None}) == "512"
    whole = entry | {"value": 2048, "low": 2048, "high": 2048, "longest_tested": True}
    assert tables.effective_length(whole) == "≥ 2,048"
    assert tables.effective_length(entry | {"value": 0}) == "< 256"


def test_lengths_table_shows_what_was_measured(both):
    table = tables.lengths_table(both)
    assert "nats per byte" in table.caption
    loss = both[0].evaluation["lengths"][3]["loss"]
    shown = cell(table, 0, "loss at 8× (512)")
    assert shown == f"{loss['value']:.3f} ± {(loss['high'] - loss['low']) / 2:.3f}"
    assert cell(table, 0, "parameters") == "812,544"
    assert cell(table, 0, "effective length") == "64"
    assert cell(table, 1, "effective length") == "≥ 512"


def test_differences_are_against_the_first_run(both):
    table = tables.differences_table(both)
    points = [run.evaluation["lengths"][3]["loss"]["value"] for run in both]
    assert cell(table, 0, "8× (512)").startswith(f"{points[1] - points[0]:.3f} ±")
    assert len(table.rows) == 1
    assert tables.differences_table(both[:1]) is None
    assert tables.differences_table([]) is None


def test_runs_on_other_documents_are_not_paired(both, tmp_path):
    other = make(tmp_path / "other", steps=5, documents=held_out(5))
    assert tables.differences_table([both[0], *runs.read_all([other])]) is None


def test_runs_of_other_lengths_share_a_table(both, tmp_path):
    other = make(tmp_path / "o", steps=5, train_length=32, multiples=(1, 16), tokenizer="bpe")
    table = tables.lengths_table([*both, *runs.read_all([other])])
    assert "nats per token" in table.caption
    assert cell(table, 0, "loss at 16× (512)") == "–"
    assert cell(table, 2, "loss at 1×") != "–"
    assert cell(table, 2, "loss at 2× (128)") == "–"


def test_beyond_perplexity_and_training(both):
    beyond = tables.beyond_table(both)
    assert len(beyond.header) == 1 + 2 * 3
    assert cell(beyond, 1, "excess at 8× (512)").startswith("-0.")
    perplexity = tables.perplexity_table(both)
    assert [row[1] for row in perplexity.rows] == ["non-overlapping", "sliding"] * 2
    training = tables.training_table(both)
    assert cell(training, 0, "last step") == "20"
    assert float(cell(training, 0, "lowest loss")) <= float(cell(training, 0, "last loss"))


def test_config_keys_that_differ(both):
    table = tables.config_table(both)
    assert table.rows == [["model.positions", "rope", "alibi"]]
    assert tables.config_table(both[:1]) is None
    without = both[1]._replace(config={"model.depth": 4, "workdir": "x"})
    assert ["optimizer.lr", "0.003", "–"] in tables.config_table([both[0], without]).rows


def test_text_is_aligned():
    text = tables.to_text(Table("c", ["run", "loss"], [["long name", "1"], ["b", "12.5"]]))
    assert text.splitlines() == [
        "c",
        "",
        "run        loss",
        "---------  ----",
        "long name     1",
        "b          12.5",
    ]


def test_html_is_escaped_and_has_scopes():
    table = Table('<c> & "d"', ["run", "<b>"], [["<script>", "1 & 2"]])
    html = tables.to_html(table)
    assert "<script>" not in html and "<b>" not in html and '& "' not in html
    assert html.count('scope="col"') == 2 and html.count('scope="row"') == 1
    assert "<caption>&lt;c&gt; &amp; &quot;d&quot;</caption>" in html
