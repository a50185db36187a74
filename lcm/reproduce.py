"""Experiments by name: `run(workdir, scale)` of `experiments/NAME/experiment.py`."""

import importlib.util
import pathlib

from lcm.errors import UserError

# Beside the package in a checkout; experiments are files to read and to fork, not part of it.
FOLDER = pathlib.Path(__file__).parent.parent / "experiments"


def names(folder: pathlib.Path = FOLDER) -> list[str]:
    """Experiments that are there."""
    return sorted(file.parent.name for file in folder.glob("*/experiment.py"))


def run(name: str, workdir: pathlib.Path | None = None, scale: str = "cpu") -> None:
    """Runs an experiment in a workdir, `runs/NAME` by default; finished parts are not run again.

    Raises:
        UserError: if there is no such experiment or scale.
    """
    folder = FOLDER
    if name not in names(folder):
        known = ", ".join(names(folder))
        raise UserError(
            f"experiment {name!r} is unknown: choose from {known}"
            if known
            else f"there are no experiments at {folder}: clone the repository and pip install -e it"
        )
    spec = importlib.util.spec_from_file_location(
        f"lcm_experiment_{name}", folder / name / "experiment.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if scale not in module.SCALES:
        raise UserError(f"--scale={scale} is unknown to {name}: {' or '.join(module.SCALES)}")
    module.run(workdir or pathlib.Path("runs") / name, scale)
