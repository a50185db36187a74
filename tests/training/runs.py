"""Helpers of the training tests: runs in processes of their own, and what they logged."""

import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]


def command(workdir: pathlib.Path, *overrides: str) -> list[str]:
    config = ROOT / "configs" / "byte_lm.py"
    keys = [f"--config.{o}" for o in overrides]
    return [
        sys.executable,
        "-m",
        "lcm",
        "train",
        f"--config={config}:tiny",
        f"--workdir={workdir}",
        *keys,
    ]


def start(workdir: pathlib.Path, *overrides: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(workdir, *overrides),
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def finish(workdir: pathlib.Path, *overrides: str, **environment: str) -> tuple[int, str]:
    process = start(workdir, *overrides, **environment)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def logged(workdir: pathlib.Path) -> dict[int, dict]:
    """The whole lines of metrics.jsonl by step."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return {entry["step"]: entry for entry in entries}


def wait_for_step(workdir: pathlib.Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while max(logged(workdir), default=0) < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.02)


def losses(workdir: pathlib.Path) -> dict[int, tuple]:
    """What must not depend on interruptions: everything but speed."""
    return {
        step: (entry["loss"], entry["grad_norm"], tuple(entry["loss_by_position"]))
        for step, entry in logged(workdir).items()
    }
