"""`lcm train` in several processes on this machine: stopped, killed, hung, and begun again."""

import fcntl
import json
import os
import pathlib
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest
from programs import free_port, start

from lcm.training import checkpoints, loop, workdir

sys.path.append(str(pathlib.Path(__file__).parents[1] / "training"))
from runs import logged, losses

STEPS = 24
KEYS = {
    "train.steps": STEPS,
    "train.log_every": 1,
    "data.packing": "first_fit",
    "checkpoint.every": 8,
    "checkpoint.keep": 9,
    "mesh.fsdp": 2,
}


def begin(folder: pathlib.Path, count: int, devices: int = 1, **keys: object) -> list:
    """The processes of a run, each with so many devices."""
    changed = {**KEYS, **{key.replace("__", "."): value for key, value in keys.items()}}
    words = ["-m", "lcm", "train", "--config=configs/byte_lm.py:tiny", f"--workdir={folder}"]
    words += [f"--config.{key}={value}" for key, value in changed.items()]
    if count == 1:
        return [start(*words, devices=devices)]
    words += [f"--coordinator=localhost:{free_port()}", f"--processes={count}", "--wait=20"]
    return [start(*words, f"--process={i}", devices=devices) for i in range(count)]


def end(processes: list, seconds: float = 240) -> tuple[list[int], list[str]]:
    """Their statuses and what they said, once all have ended."""
    try:
        said = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def wait_for(folder: pathlib.Path, step: int, processes: list) -> None:
    """Waits until a step has been logged."""
    deadline = time.monotonic() + 240
    while max(logged(folder), default=0) < step:
        gone = [process for process in processes if process.poll() is not None]
        assert not gone, gone[0].stderr.read()[-3000:]
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.02)


def at_the_end(folder: pathlib.Path) -> tuple[dict, dict]:
    """The arrays of the last checkpoint, by name, and the position in the data."""
    like = loop.abstract_state(workdir.read_config(folder))
    restored = checkpoints.restore(folder, like)
    assert restored.step == STEPS
    return jax.device_get(checkpoints._named(checkpoints._items(restored.state))), restored.data


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    statuses, said = end(begin(folder, 2))
    assert statuses == [0, 0], said
    return folder


def copied_at(whole: pathlib.Path, folder: pathlib.Path, step: int) -> pathlib.Path:
    """A copy of the run as it was when it had saved a step."""
    shutil.copytree(whole, folder)
    for later in checkpoints.steps(folder):
        if later > step:
            shutil.rmtree(folder / checkpoints.FOLDER / str(later))
    return folder


def test_error_of_process_0_ends_all_with_its_message(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with open(folder / ".lock", "w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        statuses, said = end(begin(folder, 2), 120)
    assert statuses == [2, 2], said
    says = f"lcm: error: workdir {folder} is in use by process 4711"
    assert all(line.startswith(says) and line.count("\n") == 1 for line in said), said
    assert not (folder / workdir.CONFIG).exists()


@pytest.mark.slow
def test_stopped_killed_and_begun_again_is_the_run_that_never_was(whole, tmp_path):
    """A signal to one process stops both at one step; a kill of one ends both, in bounded time."""
    folder = tmp_path / "run"
    processes = begin(folder, 2)
    wait_for(folder, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    statuses, said = end(processes)
    assert statuses == [75, 75], said
    stopped = checkpoints.steps(folder)[-1]
    assert stopped < STEPS and f"stopped at step {stopped}, saved" in said[0]
    assert said[1] == ""

    processes = begin(folder, 2)
    wait_for(folder, stopped + 1, processes)
    killed = time.monotonic()
    processes[1].kill()
    statuses, said = end(processes, 60)
    assert statuses == [69, -9] and time.monotonic() - killed < 50
    assert said[0].splitlines()[-1].startswith("lcm: error: process 0")
    assert "run the same command for all again" in said[0].splitlines()[-1]

    statuses, said = end(begin(folder, 2))
    assert statuses == [0, 0], said
    assert losses(folder) == losses(whole)
    (arrays, data), (want, place) = at_the_end(folder), at_the_end(whole)
    assert data == place
    jax.tree.map(np.testing.assert_array_equal, arrays, want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [(1, 2, {"mesh__data": 2, "mesh__fsdp": 1}), (4, 1, {"mesh__fsdp": 4, "mesh__data": 1})],
)
def test_other_counts_and_meshes_go_on_with_the_same_batches(count, devices, mesh, whole, tmp_path):
    folder = copied_at(whole, tmp_path / "run", 8)
    statuses, said = end(begin(folder, count, devices, **mesh))
    assert statuses == [0] * count, said
    assert f"resumed {folder} at step 8" in said[0]
    (arrays, data), (want, place) = at_the_end(folder), at_the_end(whole)
    assert data == place  # no document is lost or read twice
    found, expected = losses(folder), losses(whole)
    assert found.keys() == expected.keys()
    for step in expected:
        np.testing.assert_allclose(found[step][0], expected[step][0], rtol=2e-5)
    assert arrays.keys() == want.keys()


@pytest.mark.slow
def test_damaged_checkpoint_is_set_aside_for_all(whole, tmp_path):
    """Also where process 1 alone cannot read it: what it lacks is not read by process 0."""
    folder = copied_at(whole, tmp_path / "run", 16)
    newest = folder / checkpoints.FOLDER / "16"
    files = [f for f in newest.rglob("*") if f.is_file() and "ocdbt.process_1" in str(f)]
    data = max(files, key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    statuses, said = end(begin(folder, 2))
    assert statuses == [0, 0], said
    assert f"checkpoint {newest} is damaged" in said[0]
    assert f"resumed {folder} at step 8" in said[0]
    assert (folder / "corrupt" / "16").is_dir()
    assert losses(folder) == losses(whole)


@pytest.mark.slow
def test_hang_of_one_ends_the_other_with_stacks(tmp_path):
    folder = tmp_path / "run"
    processes = begin(folder, 2, train__steps=10_000, train__hang_seconds=4)
    wait_for(folder, 3, processes)
    beat = json.loads((folder / "heartbeat-1.json").read_text())
    assert beat["process"] == 1
    os.kill(beat["pid"], signal.SIGSTOP)
    stopped = time.monotonic()
    assert processes[0].wait(timeout=60) == 70
    assert time.monotonic() - stopped < 30
    processes[1].kill()
    _, said = end(processes)
    assert "lcm: error: process 0: no step has ended for" in said[0]
    assert "loop.py" in (folder / "hang-0.txt").read_text()


@pytest.mark.slow
def test_two_processes_begin_with_the_parameters_of_a_run_as_one_does(whole, tmp_path):
    keys = {"train__init": whole, "train__steps": 2, "train__warmup": 1, "train__ema": 0.9}
    for count, fsdp in ((1, 1), (2, 2)):
        folder = tmp_path / str(count)
        statuses, said = end(begin(folder, count, mesh__fsdp=fsdp, **keys))
        assert statuses == [0] * count, said
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert one.keys() == two.keys() == {1, 2}
    assert one[1][0] < losses(whole)[1][0] - 1  # it has learned
    np.testing.assert_allclose(two[1][0], one[1][0], rtol=2e-5)
