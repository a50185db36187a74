"""`lcm evaluate` in two processes on this machine: the result of one, written once."""

import json
import re

import numpy as np
import pytest
from programs import free_port, start

from lcm import cli, training
from lcm.errors import ConfigError, UserError
from lcm.parallel import make_reading

HERE = "--coordinator=localhost:1234", "--processes=2", "--process=0"
KEYS = "eval.multiples=1,2", "eval.tokens=1024", "eval.batch_tokens=256"


@pytest.fixture
def run(tiny, tmp_path):
    """The workdir of a run on one device, of few steps."""
    folder = tmp_path / "run"
    training.train(tiny("train.steps=2", "train.warmup=1", "mesh.order=zigzag"), folder)
    return folder


def command(*words: str, keys: tuple[str, ...] = KEYS) -> list[str]:
    return ["evaluate", *words, *(f"--config.{key}" for key in keys)]


def on_two(*words: str, mesh: tuple[str, ...]) -> tuple[list[list[str]], list[str]]:
    """What two processes with two devices each print, and what they say, once both are done."""
    given = ["-m", "lcm", *command(*words, keys=(*KEYS, *mesh))]
    given += [f"--coordinator=localhost:{free_port()}", "--processes=2", "--wait=60"]
    processes = [start(*given, f"--process={n}", devices=2) for n in range(2)]
    try:
        told = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], told
    return [_own(out) for out, _ in told], [said for _, said in told]


def _own(out: str) -> list[str]:
    """The lines that are not of the library that connects CPUs, whose threads write in pieces."""
    lines = out.splitlines()
    return [x for x in lines if not x.startswith("[Gloo]") and "peer ranks" not in x]


def close(got: object, want: object) -> None:
    """Equal but for rounding, as sums over devices are in another order."""
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for key, value in want.items():
            close(got[key], value)
    elif isinstance(want, list):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            close(one, other)
    elif isinstance(want, float):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    else:
        assert got == want


@pytest.mark.slow
def test_two_processes_find_what_one_does(run, capsys):
    assert cli.main(command(str(run))) == 0
    (file,), printed = (run / "eval").iterdir(), capsys.readouterr().out
    want = json.loads(file.read_text())
    file.unlink()
    out, said = on_two(str(run), mesh=("mesh.data=1", "mesh.fsdp=2", "mesh.context=2"))
    assert list((run / "eval").iterdir()) == [file]  # meshes are no variants
    close(json.loads(file.read_text()), want)
    assert out[0][0] == f"wrote {file}" and len(out[0]) == len(printed.splitlines())
    assert out[1] == [] and "evaluate run" in said[0] and "evaluate run" not in said[1]
    assert want["lengths"][1]["tokens"] > 512


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_has_kept(run, tmp_path):
    """Losses of a model by name: of one length kept by one process, of the other by two."""
    found = {}
    for name, lengths in (("one", "32,64"), ("two", "64")):
        words = f"--model={run}", f"--workdir={tmp_path / name}", f"--lengths={lengths}"
        assert cli.main(command(*words)) == 0
    words = f"--model={run}", f"--workdir={tmp_path / 'two'}", "--lengths=32,64"
    on_two(*words, mesh=("mesh.data=2", "mesh.tensor=2"))
    for name in ("one", "two"):
        (file,) = (tmp_path / name / "eval").glob("*.json")
        found[name] = json.loads(file.read_text())
        assert len(list((tmp_path / name / "eval" / "losses").iterdir())) == 2
    close(found["two"], found["one"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model=x", "--passkey", *HERE], "--passkey reads and writes on one host: leave out"),
        (["runs/x", "--coordinator=localhost:1234"], "--processes .* is missing"),
    ],
)
def test_what_one_host_does_alone_is_refused(words, said, capsys):
    assert cli.main(["evaluate", *words]) == UserError.status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(said, error), error


def test_a_mesh_of_other_devices_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"does not cover 1 devices: .* set one of them to -1"):
        make_reading(tiny("mesh.data=3"))
    assert make_reading(tiny("mesh.data=-1", "train.batch=7", "data.length=5")).size == 1
