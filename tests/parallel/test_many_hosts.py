"""`lcm train` in several processes on this machine: stopped, killed, hung, and begun again."""

import pathlib
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
