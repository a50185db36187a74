"""Reading workdirs: names, broken files, resumed metrics, several evaluations."""

import json
import shutil

import pytest

from lcm.report import runs

from .workdirs import make


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make(tmp_path_factory.mktemp("runs") / "rope", steps=30)


def test_a_whole_workdir(trained):
    (run,) = runs.read_all([trained])
    assert run.name == "rope"
    assert run.notes == []
    assert run.config == {"model.depth": 4, "model.positions": "rope", "optimizer.lr": 3e-3}
    assert [row["step"] for row in run.metrics] == list(range(1, 31))
    assert run.evaluation["settings"]["train_length"] == 64
    assert run.about("parameters") == 812_544
    assert run.about("nothing") is None


def test_names_are_the_shortest_that_differ(trained, tmp_path):
    paths = [tmp_path / "a" / "rope", tmp_path / "b" / "rope"]
    for path in paths:
        shutil.copytree(trained, path)
    assert [run.name for run in runs.read_all(paths)] == ["a/rope", "b/rope"]
    with pytest.raises(runs.ReportError, match="given twice"):
        runs.read_all([paths[0], tmp_path / "b" / ".." / "a" / "rope"])


def test_a_killed_run_loses_its_last_line_only(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "x")
    path = tmp_path / "x" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    (run,) = runs.read_all([tmp_path / "x"])
    assert run.metrics[-1]["step"] == 29
    assert len(run.notes) == 1 and "last line of metrics.jsonl is cut off" in run.notes[0]


def test_broken_lines_are_counted_and_resumed_steps_replaced(tmp_path):
    lines = ['{"step": 1, "loss": 4}', "", "garbage", '{"step": 2, "loss": 3}', '{"note": 1}', "7"]
    lines += ['{"step": "ten"}', '{"step": [1]}', '{"step": Infinity}', '{"step": 2, "loss": 2.5}']
    lines += [b"\xff\xfe".decode("latin1"), '{"step": 3, "loss": NaN}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="latin1")
    run = runs.read(tmp_path, "x")
    assert [(row["step"], row["loss"]) for row in run.metrics[:2]] == [(1, 4), (2, 2.5)]
    assert len(run.metrics) == 3
    assert run.notes == [
        "no config.json",
        "7 lines of metrics.jsonl are no records with a step and were left out: 3, 5, 6, 7, 8, ...",
    ]


def test_the_latest_step_is_shown(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "x")
    folder = tmp_path / "x" / "eval"
    result = json.loads((folder / "length.json").read_text())
    for name, step in (("a", 9000), ("z", 200)):
        result["about"] = {"step": step}
        (folder / f"{name}.json").write_text(json.dumps(result))
    (folder / "broken.json").write_text("{")
    (folder / "retrieval.json").write_text('{"kind": "retrieval"}')
    (run,) = runs.read_all([tmp_path / "x"])
    assert run.about("step") == 9000
    assert any("eval/a.json; 2 earlier" in note for note in run.notes)
    assert any("broken.json is not JSON" in note for note in run.notes)


def test_a_broken_config_is_a_note(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "x")
    for text in ("{", "[1]"):
        (tmp_path / "x" / "config.json").write_text(text)
        (run,) = runs.read_all([tmp_path / "x"])
        assert run.config == {} and "config.json cannot be read" in run.notes[0]


def test_nothing_to_report(tmp_path):
    with pytest.raises(runs.ReportError, match="no workdir"):
        runs.read_all([])
    with pytest.raises(runs.ReportError, match="absent does not exist"):
        runs.read_all([tmp_path / "absent"])
    with pytest.raises(runs.ReportError, match="neither metrics nor evaluations"):
        runs.read_all([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"ste')
    with pytest.raises(runs.ReportError, match="cut off"):
        runs.read_all([tmp_path])


def test_flatten():
    assert runs.flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {
        "a.b": 1,
        "a.c.d": [2],
        "e": {},
    }
