"""The quickstart at a tiny scale, as processes: stopped, gone on with, and run again."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from lcm import cli
from lcm.training import loop

ENCODINGS = ("rope", "nope", "alibi")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A command that works in a folder, and that folder."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    command = [sys.executable, "-m", "lcm", "reproduce", "quickstart", "--scale", "tiny"]
    command += ["--workdir", str(folder)]

    def start() -> subprocess.Popen:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=folder.parent, **streams)

    return start, folder


@pytest.fixture(scope="module")
def stopped(quickstart):
    """The first run, told to stop while the second decoder trains: its folder and what it said."""
    start, folder = quickstart
    process = start()
    events = folder / "nope" / "tensorboard"
    while process.poll() is None and not events.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err, files(folder)


@pytest.fixture(scope="module")
def finished(quickstart, stopped):
    """The same command again, to its end."""
    start, folder = quickstart
    process = start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err, files(folder)


def files(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """When each file was last written, and its size."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    stats = {str(path.relative_to(folder)): path.stat() for path in found}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def kept(written: dict[str, tuple[int, int]], name: str) -> dict[str, tuple[int, int]]:
    """What a decoder's training and evaluation wrote: all but what each start writes anew."""
    started = [f"{name}/{file}" for file in (".lock", "config.json", "heartbeat-0.json")]
    return {
        file: stat
        for file, stat in written.items()
        if file.startswith(f"{name}/") and file not in started
    }


@pytest.mark.slow
def test_stopped_run_is_saved_and_says_so(stopped):
    code, out, err, written = stopped
    assert code == 0
    assert "stopped at step" in err and "the same command goes on" in err
    assert "Traceback" not in err
    assert "rope/eval/step-20.json" in written
    assert any(file.startswith("nope/checkpoints/") for file in written)
    assert not any(file.startswith("alibi/") for file in written)
    assert "report.html" not in written and "wrote" not in out


def test_second_run_goes_on(stopped, finished):
    *_, before = stopped
    _, err, after = finished
    assert kept(before, "rope") == kept(after, "rope")
    assert "train rope" not in err and "evaluate rope" not in err
    assert re.search(r"resumed \S+nope at step \d+", err)


def test_table_compares_the_three(finished):
    out, _, _ = finished
    for name in ENCODINGS:
        row = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        losses = re.findall(r"(\d\.\d{3}) ± (\d\.\d{3})", row)
        assert len(losses) >= 4  # 1, 2, 4 and 8 times the training length, with intervals
        assert all(0 < float(loss) < 8 and float(margin) > 0 for loss, margin in losses)
    for multiple in (1, 2, 4, 8):
        assert f"loss at {multiple}×" in out
    assert out.rstrip().endswith("report.html")


def test_curves_are_those_of_the_files(quickstart, finished):
    _, folder = quickstart
    out, _, _ = finished
    for name in ENCODINGS:
        result = json.loads((folder / name / "eval" / "step-20.json").read_text())
        assert [point["length"] for point in result["lengths"]] == [32, 64, 128, 256]
        row = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        for point in result["lengths"]:
            assert f"{point['loss']['value']:.3f}" in row


def test_runs_differ_in_their_encoding_alone(quickstart, finished):
    _, folder = quickstart
    configs = [json.loads((folder / name / "config.json").read_text()) for name in ENCODINGS]
    for name, cfg in zip(ENCODINGS, configs, strict=True):
        assert cfg.pop("name") == name
        assert cfg["model"].pop("positions")["name"] == name
    assert configs[0] == configs[1] == configs[2]


def test_page_opens_offline(quickstart, finished):
    _, folder = quickstart
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    loaded = re.findall(r"""(?:src|srcset|poster|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert len(loaded) >= 3  # the plots
    assert all(source.startswith("data:image/png;base64,") for source in loaded)
    assert not re.search(r"<(script|link|iframe|object|embed)\b[^>]*(src|href)\s*=", page, re.I)
    assert not re.search(r"url\(\s*['\"]?(?!data:)|@import", page)
    assert all(name in page for name in ENCODINGS)


def test_third_run_trains_nothing(quickstart, finished, capsys, monkeypatch):
    _, folder = quickstart
    first, _, before = finished

    def train(*arguments, **keywords):
        raise AssertionError("a finished decoder is trained again")

    monkeypatch.setattr(loop, "make_step", train)
    words = ["reproduce", "quickstart", "--scale", "tiny", "--workdir", str(folder)]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert out == first and err == ""
    after = files(folder)
    for name in ENCODINGS:
        assert kept(after, name) == kept(before, name)
        assert f"{name}/eval/step-20.json" in kept(after, name)
    assert sorted(after) == sorted(before)
