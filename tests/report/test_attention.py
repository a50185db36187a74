"""The section on attention: from files of analyses to the page, its tables and its pictures."""

import json

import numpy as np
import pytest

from lcm.evaluation import save
from lcm.report import attention, attention_plots, page, runs, tables

from .workdirs import make

LENGTHS = (64, 256)


def analysis(*, fields=None, erf=20, scores=None, overrides=(), step=10, flat=0.7):
    """As `lcm analyse` writes it: entropy a share of its bound, two layers."""
    bound = {n: np.log(np.arange(1, n + 1)) for n in LENGTHS}
    left = {"left_out": "Such adds none"}
    return {
        "schema": 1,
        "kind": "attention",
        "about": {"run": "r", "step": step, "overrides": list(overrides)},
        "settings": {"train_length": 64, "length": 256, "rows": 2, "seed": 0},
        "statistics": [
            {
                "length": n,
                "entropy": [(flat * bound[n]).tolist(), (0.5 * bound[n]).tolist()],
                "largest": [np.exp(-flat * bound[n]).tolist()] * 2,
            }
            for n in LENGTHS
        ],
        "positional_heads": [
            {
                "length": n,
                "distance": n // 2,
                "score": scores,
                "allocation": scores,
                "top": [[1, 0]],
            }
            for n in LENGTHS
        ]
        if scores
        else left,
        "receptive_field": {
            "theoretical": {"eps": 0.01, "by_head": fields} if fields else left,
            "empirical": {"length": 64, "perplexity": 9.0, "eps": 0.09, "tokens": erf},
        },
        "aligned_temperature": {"entropy": 0.71, "largest": 0.82},
    }


RESULTS = {
    "alibi": {"eval": {"": analysis(fields=[[10, 30], [40, 40]], erf=18)}},
    "type_one": {"eval": {"": analysis(fields=[[61, 61], [61, 61]], erf=30)}},
    "t5": {"eval": {"": analysis(fields=[["inf", 9], [9, 9]], erf=25)}},
    "rope": {
        "eval": {
            "": analysis(scores=[[0.5, -0.25], [0.75, None]]),
            "-model.positions=yarn": analysis(
                scores=[[0.25, 0.0], [1.0, -1.0]], overrides=["model.positions=yarn"], flat=0.6
            ),
        }
    },
}


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for name, result in RESULTS.items():
        workdir = make(folder / name, steps=10, evaluated=False)
        for variant, each in result["eval"].items():
            save(each, workdir / "eval" / f"attention-step-10{variant}.json")
        found.append(workdir)
    old = analysis(step=4)
    save(old, folder / "rope" / "eval" / "attention-step-4.json")
    return found


@pytest.fixture(scope="module")
def results(workdirs):
    return runs.by_name(runs.read_all(workdirs), "attention")


def cells(table):
    return {row[0]: row[1:] for row in table.rows}


def test_newest_step_with_its_variants(results):
    assert list(results) == ["alibi", "type_one", "t5", "rope", "rope, model.positions=yarn"]
    assert all(result["about"]["step"] == 10 for result in results.values())


def test_fields_beside_each_other_with_both_orders(results):
    table = cells(attention.fields_table(results))
    assert table["alibi"] == ["30", "40", "18", "1", "1"]
    assert table["type_one"] == ["61", "61", "30", "2", "5"]
    assert table["t5"] == ["∞", "∞", "25", "3", "4"]
    assert table["rope"] == ["–", "–", "20", "–", "2"]
    # alibi before type_one and before t5 by both; type_one and t5 the other way round
    assert attention.agreement(results) == (2, 3)


def test_means_heads_and_temperatures(results):
    entropy = 0.6 * np.mean(np.log(np.arange(1, 257)))
    table = attention.by_length_table(results)
    rows = {(row[0], row[1]): row[2:] for row in table.rows}
    assert rows["alibi", "256"][0] == tables.number(entropy)
    assert rows["rope", "64"][2:] == ["0.333", "2.1"]
    assert rows["alibi", "64"][2:] == ["–", "–"]
    assert cells(attention.temperatures_table(results))["t5"] == ["256", "0.710", "0.820"]
    left = attention.left_out_table(results).rows
    assert ["alibi", "positional heads", "Such adds none"] in left
    assert ["rope", "theoretical receptive field", "Such adds none"] in left and len(left) == 5


def test_entropy_is_drawn_below_its_bound_with_the_trained_length(results):
    figure = attention_plots.entropy_by_position(results)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title(loc="left") for ax in shown] == list(results)
    for ax in shown:
        bound, first, second, trained = ax.lines
        x, y = first.get_data()
        assert trained.get_xdata()[0] == 64 and x[0] == 1 and x[-1] == pytest.approx(256, rel=0.06)
        assert np.all(first.get_ydata() <= bound.get_ydata() + 1e-9)
        np.testing.assert_allclose(second.get_ydata(), 0.5 * bound.get_ydata())
    np.testing.assert_allclose(y, 0.6 * bound.get_ydata(), atol=1e-9)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["bound, ln of the keys", "layer 1", "layer 2"]


def test_heat_maps_show_the_scores_and_what_has_none(results):
    figure = attention_plots.head_scores(attention.having(results, "positional_heads"))
    maps = [ax for ax in figure.axes if ax.images]
    scores = np.ma.filled(maps[0].images[0].get_array(), np.nan)
    np.testing.assert_array_equal(scores, [[0.5, -0.25], [0.75, np.nan]])
    assert maps[0].images[0].get_clim() == (-1, 1)
    assert [t.get_text() for t in maps[0].texts] == ["0.50", "-0.25", "0.75", "–"]


def test_the_page_has_the_section_and_its_pictures(workdirs, tmp_path):
    out = page.write(workdirs, tmp_path / "report.html")
    text = out.read_text()
    assert "<h2>Attention</h2>" in text and "order 2 of them alike" in text
    assert "Receptive fields in tokens" in text and "Aligned temperatures" in text
    for name in ("attention-entropy", "attention-heads"):
        assert (tmp_path / f"report-{name}.png").stat().st_size > 5000
    assert "not an evaluation of loss" not in text


def test_a_run_that_was_only_analysed_and_one_that_never_was(tmp_path, workdirs):
    plain = make(tmp_path / "plain", steps=3, evaluated=False)
    assert "Attention</h2>" not in page.write([plain], tmp_path / "plain.html").read_text()
    alone = tmp_path / "alone"
    save(analysis(fields=[[3, 4]]), alone / "eval" / "attention-step-1.json")
    text = page.write([alone], tmp_path / "alone.html").read_text()
    assert "<h2>Attention</h2>" in text and "tell" not in text.split("ERF does.")[1][:10]
    assert not (tmp_path / "alone-attention-heads.png").exists()


def test_a_damaged_file_is_a_note(tmp_path):
    workdir = make(tmp_path / "run", steps=3, evaluated=False)
    (workdir / "eval").mkdir()
    (workdir / "eval" / "attention-step-3.json").write_text("{")
    (workdir / "eval" / "attention-step-2.json").write_text(
        json.dumps({"kind": "attention", "schema": 1})
    )
    (run,) = runs.read_all([workdir])
    assert run.analyses == {"attention": [], "states": []}
    assert any("not JSON" in note for note in run.notes)
    assert any("is damaged" in note for note in run.notes)
