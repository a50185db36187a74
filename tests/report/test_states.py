"""The section on recurrent states: from files of analyses to the page, its tables and pictures."""

import numpy as np
import pytest

from lcm import cli
from lcm.evaluation import save
from lcm.report import page, runs, states, states_plots

from .workdirs import make


def analysis(*, growth=2.0, arrays=("",), overrides=()):
    """As `lcm analyse` writes it: two layers, the second of which grows from 64 tokens to 256."""
    starts = list(range(0, 256, 8))
    positions = list(range(4, 257, 4))
    steady = np.where(np.array(positions) < 64, 1.0, 3.0)
    grows = np.interp(positions, [64, 256], [1.0, growth])
    return {
        "schema": 1,
        "kind": "states",
        "about": {"run": "r", "step": 10, "overrides": list(overrides)},
        "settings": {"train_length": 64, "length": 256, "rows": 2, "seed": 0},
        "remembrance": [
            {"length": 64, "starts": starts[:8], "distance": [n / 64 for n in starts[:8]]},
            {"length": 256, "starts": starts, "distance": [n / 256 for n in starts]},
        ],
        "distances": [
            {"length": n, "layers": [{"layer": 1, "by_head": [n / 4, n / 2, None]}]}
            for n in (64, 256)
        ],
        "norms": {
            "positions": positions,
            "layers": [
                {"layer": n, "array": array, "mean": mean.tolist(), "largest": mean.tolist()}
                for n, mean in enumerate((steady, grows))
                for array in arrays
            ],
        },
    }


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    found = {
        "mamba2": [analysis(), analysis(growth=1.25, overrides=["model.extension=step=0.5"])],
        "s5": [analysis(arrays=("im", "re"))],
        "conv": [analysis() | {part: {"left_out": "It has none"} for part in states.PARTS}],
    }
    for name, results in found.items():
        workdir = make(folder / name, steps=10, evaluated=False)
        for n, each in enumerate(results):
            save(each, workdir / "eval" / f"states-step-10{'-x' * n}.json")
    return [folder / name for name in found]


def test_tables(workdirs):
    remembrance, distances, norms, left = states.state_tables(runs.read_all(workdirs))
    assert ["mamba2", "64", "0.500", "–"] in remembrance.rows
    assert ["mamba2", "256", "0.500", "0.750"] in remembrance.rows
    assert ["s5", "256", "96.0", "128.0", "2.2"] in distances.rows
    assert norms.rows == [
        ["mamba2", "layer 2", "1.000", "2.000", "2.00"],
        ["mamba2, model.extension=step=0.5", "layer 2", "1.000", "1.250", "1.25"],
        ["s5", "layer 2, im", "1.000", "2.000", "2.00"],
    ]
    assert left.rows == [["conv", text, "It has none"] for text in states.PARTS.values()]


def test_lines_are_the_figures_with_the_trained_length(workdirs):
    results = runs.by_name(runs.read_all(workdirs), "states")
    (ax,) = states_plots.remembrance(results).axes
    *lines, trained = ax.lines
    assert [line.get_label() for line in lines] == list(results) and trained.get_xdata()[0] == 192
    assert lines[0].get_ydata()[-1] == pytest.approx(248 / 256)

    del results["conv"]
    figure = states_plots.norms(results)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [len(ax.lines) for ax in shown] == [3, 3, 5]
    steady, grows, trained = shown[0].lines
    assert trained.get_xdata()[0] == 64 and grows.get_ydata()[-1] == 2
    assert steady.get_color().tolist() != grows.get_color().tolist()
    one, other = shown[2].lines[:2]
    assert one.get_linestyle() != other.get_linestyle()


def test_states_that_overflow_are_shown_as_far_as_they_are_numbers(tmp_path):
    """As JSON has them: "inf", and null for what is no number."""
    result = analysis()
    steady, grows = result["norms"]["layers"]
    steady["mean"][-1], grows["mean"][-1] = None, "inf"
    result["remembrance"][1]["distance"] = [None] * 32
    save(result, tmp_path / "run" / "eval" / "states-step-10.json")
    page.write([tmp_path / "run"], tmp_path / "report.html")
    tables = {t.caption[:5]: t.rows for t in states.state_tables(runs.read_all([tmp_path / "run"]))}
    assert tables["Norms"] == [["run", "layer 2", "1.000", "inf", "inf"]]
    assert tables["Effec"][1] == ["run", "256", "–", "–"]


def test_a_file_without_a_part_is_a_note(tmp_path):
    workdir = make(tmp_path / "run", steps=3, evaluated=False)
    less = {name: part for name, part in analysis().items() if name != "distances"}
    save(less, workdir / "eval" / "states-step-3.json")
    (run,) = runs.read_all([workdir])
    assert run.analyses["states"] == []
    assert any("is damaged ('distances')" in note for note in run.notes)


def test_the_page_has_the_section_and_a_run_without_it_has_not(workdirs, tmp_path):
    text = page.write(workdirs, tmp_path / "report.html").read_text()
    assert "<h2>Recurrent states</h2>" in text and "Norms of states" in text
    for name in ("states-remembrance", "states-norms"):
        assert (tmp_path / f"report-{name}.png").stat().st_size > 5000
    plain = make(tmp_path / "plain", steps=3, evaluated=False)
    assert "Recurrent states" not in page.write([plain], tmp_path / "plain.html").read_text()


def test_a_run_that_was_only_analysed_is_reported(tmp_path, capsys):
    alone = tmp_path / "alone"
    save(analysis(), alone / "eval" / "states-step-10.json")
    assert cli.main(["report", str(alone), "--out", str(tmp_path / "page.html")]) == 0
    assert "alone" in capsys.readouterr().out
