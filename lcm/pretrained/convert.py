"""From any form of a model that lcm reads to a Hugging Face folder."""

import pathlib

from lcm.pretrained.export import save_folder
from lcm.pretrained.model import load


def convert(
    source: str | pathlib.Path, folder: str | pathlib.Path, dtype: str = "float32"
) -> pathlib.Path:
    """Writes a workdir, a folder, a GGUF file or a named model as a folder; returns the folder.

    Raises:
        UserError: what `load` and `save_folder` raise.
    """
    return save_folder(load(source, dtype=dtype), folder, dtype=dtype)
