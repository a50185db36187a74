"""One uninterrupted run that the others are compared with."""

import pathlib

import pytest
from runs import finish

# Short steps and many of them, so that a signal lands in the middle.
STEPS = ("train.steps=60", "train.log_every=1", "checkpoint.every=10")


@pytest.fixture(scope="session")
def steps():
    return STEPS


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, errors = finish(workdir, *STEPS)
    assert code == 0, errors
    return workdir
