"""A folder as Hugging Face lays it out: `config.json` and safetensors, whole or in shards."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from lcm.errors import CheckpointError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Files that hold pickled Python, which can run anything when it is read.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Folder:
    """The `Source` of a folder.

    A file is mapped while one tensor of it is read, so that its pages do not add up in memory.

    Raises:
        CheckpointError: if there is no config or no safetensors, or a file is damaged.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self.config: dict[str, Any] = read_json(self.path / CONFIG)
        self._files: dict[str, pathlib.Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in _files(self.path):
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  it is no dict
                    part = tensors.get_slice(name)
                    _check_dtype(file, name, part.get_dtype())
                    self._files[name], self._shapes[name] = file, tuple(part.get_shape())

    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> np.ndarray:
        with _opened(self._files[name], name) as tensors:
            return tensors.get_tensor(name)


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        CheckpointError: if it is not there, or no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}): a pretrained model is a folder with {CONFIG} and "
            f"{WEIGHTS}, as transformers' save_pretrained writes it"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not keys: fetch it again")
    return content


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of weights, by the index where there is one."""
    if (folder / INDEX).is_file():
        shards = _shards(folder / INDEX)
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder / INDEX} names {len(shards)} shards, of which {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing: fetch them again"
            )
        return [folder / shard for shard in shards]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds {pickles[0]}, a pickle, which can run any code when it is read: "
            "convert it where you trust it, by transformers' "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other, "
            "safe_serialization=True)"
        )
    raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}: fetch the weights too")


def _shards(index: pathlib.Path) -> list[str]:
    home = read_json(index).get("weight_map")
    if not isinstance(home, dict) or not home:
        raise CheckpointError(f"{index} has no weight_map from tensors to files: fetch it again")
    return sorted(set(home.values()))


@contextlib.contextmanager
def _opened(file: pathlib.Path, name: str = "") -> Iterator[Any]:
    """A safetensors file, mapped for as long as the block runs."""
    import safetensors

    try:
        with safetensors.safe_open(file, "numpy") as tensors:
            yield tensors
    except (safetensors.SafetensorError, OSError) as error:
        what = f"tensor {name} of {file}" if name else str(file)
        raise CheckpointError(
            f"{what} cannot be read ({error}): the file is damaged or cut short, fetch it again"
        ) from error


def _check_dtype(file: pathlib.Path, name: str, dtype: str) -> None:
    if dtype not in DTYPES and name.endswith("weight"):
        raise CheckpointError(
            f"tensor {name} of {file} is {dtype}, readable are {', '.join(DTYPES)}: "
            "take a checkpoint that is not quantised"
        )
