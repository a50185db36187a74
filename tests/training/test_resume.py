"""Runs that are stopped, killed, damaged or refused, in processes of their own."""

import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from runs import finish, logged, losses, start, wait_for_step


def test_kill_9_then_resume_is_bit_identical(whole_run, steps, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, *steps)
    wait_for_step(workdir, 25, process)
    process.kill()
    process.communicate()
    assert max(logged(workdir)) < 60
    code, errors = finish(workdir, *steps)
    assert code == 0, errors
    assert "resumed" in errors and "at step 0" not in errors
    assert losses(workdir) == losses(whole_run)


def test_sigterm_saves_and_asks_to_be_run_again(whole_run, steps, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, *steps)
    wait_for_step(workdir, 13, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    stopped = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert f"stopped at step {stopped}" in errors
    assert 13 <= stopped < 60 and stopped == max(logged(workdir))
    code, errors = finish(workdir, *steps)
    assert code == 0 and f"resumed {workdir} at step {stopped}" in errors
    assert losses(workdir) == losses(whole_run)


@pytest.mark.slow
def test_sigterm_before_the_first_step_asks_to_be_run_again(whole_run, steps, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, *steps)
    while not (workdir / "heartbeat-0.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "stopped at step" in errors and "Traceback" not in errors
    code, errors = finish(workdir, *steps)
    assert code == 0, errors
    assert losses(workdir) == losses(whole_run)


def copied(run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(run, tmp_path / "run"))


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(step: pathlib.Path) -> None:
    file = largest_file(step)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(step: pathlib.Path) -> None:
    file = largest_file(step / "params")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def lose_meta(step: pathlib.Path) -> None:
    shutil.rmtree(step / "meta")


@pytest.mark.quick("flip_a_bit")
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_meta])
def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    damage, whole_run, steps, tmp_path
):
    workdir = copied(whole_run, tmp_path)
    newest = workdir / "checkpoints" / "60"
    damage(newest)
    code, errors = finish(workdir, *steps)
    assert code == 0, errors
    assert f"checkpoint {newest} is damaged" in errors
    assert f"resumed {workdir} at step 50" in errors
    assert (workdir / "corrupt" / "60").is_dir() and newest.is_dir()
    assert losses(workdir) == losses(whole_run)


def test_no_whole_checkpoint_is_an_error_that_keeps_everything(whole_run, steps, tmp_path):
    workdir = copied(whole_run, tmp_path)
    for step in (workdir / "checkpoints").iterdir():
        truncate(step)
    before = (workdir / "metrics.jsonl").read_text()
    code, errors = finish(workdir, *steps)
    assert code == 2
    assert "none of the checkpoints of steps [50, 60]" in errors.splitlines()[-1]
    assert (workdir / "metrics.jsonl").read_text() == before
    assert len(list((workdir / "corrupt").iterdir())) == 2


def test_two_runs_in_one_workdir_are_refused(tmp_path, steps):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with open(workdir / ".lock", "w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, errors = finish(workdir, *steps)
    assert code == 2
    assert f"lcm: error: workdir {workdir} is in use by process 4711" in errors
    assert not (workdir / "config.json").exists()


@pytest.mark.quick("model.width*")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.width=64", "config.model.width=32, this one has 64"),
        ("seed=5", "config.seed=0, this one has 5"),
        ("data.heldout=0.2", "config.data.heldout=0.05, this one has 0.2"),
    ],
)
def test_another_model_or_data_in_one_workdir_is_refused(
    override, message, whole_run, steps, tmp_path
):
    workdir = copied(whole_run, tmp_path)
    config = (workdir / "config.json").read_text()
    code, errors = finish(workdir, *steps, override)
    assert code == 2 and message in errors
    assert (workdir / "config.json").read_text() == config


def test_another_optimiser_state_is_refused_by_name(whole_run, steps, tmp_path):
    workdir = copied(whole_run, tmp_path)
    code, errors = finish(workdir, *steps, "train.ema=0.9")
    assert code == 2
    assert "another model or optimiser: train/average/" in errors and "absent" in errors
    assert (workdir / "checkpoints" / "60").is_dir()


def test_not_a_number_stops_and_keeps_the_last_checkpoint(tmp_path):
    workdir = tmp_path / "run"
    keys = ("train.steps=60", "train.log_every=1", "checkpoint.every=2", "train.warmup=0")
    code, errors = finish(workdir, *keys, "train.lr=1e18", "train.clip=0", "train.weight_decay=0")
    assert code == 2
    line = errors.splitlines()[-1]
    assert "lcm: error: step" in line and "is not finite" in line
    assert np.all(np.isfinite([entry["loss"] for entry in logged(workdir).values()]))


def test_unwritable_workdir_is_one_line(tmp_path, steps):
    (tmp_path / "file").write_text("")
    code, errors = finish(tmp_path / "file" / "run", *steps)
    assert code == 2
    assert "cannot be written" in errors and "Traceback" not in errors


def test_full_disk_is_one_line_and_loses_no_checkpoint(tmp_path, steps):
    """A file system of 700 KiB holds the first checkpoint and not the next ones."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("making a small file system needs root and mount")
    try:
        code, errors = finish(disk / "run", *steps, "checkpoint.keep=9")
        saved = [p.name for p in (disk / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert code == 2, errors
    assert "make room" in errors.splitlines()[-1] and "Traceback" not in errors
    assert "10" in saved
