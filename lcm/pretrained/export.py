"""From a model to a folder that transformers loads."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lcm import models, parallel
from lcm.data.tokenizers import HuggingFace
from lcm.errors import CheckpointError, ConfigError
from lcm.models import ModelSpec
from lcm.positions import PositionEncoding
from lcm.pretrained.assemble import DTYPES, read_config
from lcm.pretrained.families import FAMILIES
from lcm.pretrained.families.base import Config, Family
from lcm.pretrained.folder import CONFIG, INDEX, WEIGHTS
from lcm.pretrained.layout import Leaf, layout, tensor_shapes, tensors
from lcm.pretrained.model import GGUF, TOKENIZERS, Model

SHARD_BYTES = 5_000_000_000
TEMPLATE = "chat_template.jinja"
BESIDE = (*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json")


def save_folder(
    model: Model, folder: str | pathlib.Path, *, dtype: str = "float32"
) -> pathlib.Path:
    """Writes the model as a Hugging Face folder, whole or not at all; returns the folder.

    It holds the config, safetensors of `dtype`, in shards above 5 GB, and the tokenizer's files if
    the model's config names any.

    Raises:
        ConfigError: if no family of models that lcm knows has such a model.
        CheckpointError: if the folder holds something, or cannot be written.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown: choose from {', '.join(DTYPES)}")
    models.check_params(model.cfg, model.params)
    family, hf = family_for(model.cfg)
    leaves = layout(family, models.spec(model.cfg))
    folder = pathlib.Path(folder).expanduser()
    with _scratch(folder) as scratch:
        _write_config(scratch, {**hf, "torch_dtype": dtype}, model)
        _write_weights(scratch, leaves, model.params, dtype)
        _write_text_files(scratch, model)
    return folder


def family_for(cfg: Any) -> tuple[Family, Config]:
    """The first family that can say what the model is, and how it says it.

    A family writes what it can of a model; it is the right one if what it wrote reads as the same
    model.

    Raises:
        ConfigError: naming what the nearest family has otherwise.
    """
    spec, tried = models.spec(cfg), []
    for family in FAMILIES:
        hf, missing = _written(family, spec, cfg.data.length)
        if not missing:
            return family, {**hf, "architectures": [family.types[hf["model_type"]]]}
        tried.append((not hf, len(missing), next(iter(family.types)), missing))
    *_, name, missing = min(tried, key=lambda each: each[:2])
    raise ConfigError(
        f"no family of models has all that this one has; of {name}, the nearest: "
        f"{'; '.join(missing)}: change that, or keep the workdir, which holds any model"
    )


def _written(family: Family, spec: ModelSpec, length: int) -> tuple[Config, list[str]]:
    """The config of a model as one of a family, and what of the model that does not say."""
    try:
        hf = family.write(spec, length)
        return hf, differences(spec, models.spec(read_config(family, hf)))
    except ConfigError as error:
        return {}, [str(error)]


# What a model is run with, not what it is.
_RUNNING = {"layers", "dtype", "remat", "unroll", "backend", "length"}


def differences(ours: ModelSpec, theirs: ModelSpec) -> list[str]:
    """What tells two models apart, apart from how they are run: empty if nothing does."""
    found = _fields(ours, theirs)
    if ours.depth == theirs.depth:
        for here, there in zip(ours.in_order, theirs.in_order, strict=True):
            found += [line for line in _fields(here, there) if line not in found]
    return found


def _fields(ours: Any, theirs: Any) -> list[str]:
    lines = []
    for field in dataclasses.fields(ours):
        here, there = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name not in _RUNNING and here != there and not _idle(ours, here, there):
            lines.append(f"{field.name} is {there}, not {here}")
    return lines


def _idle(spec: Any, *encodings: Any) -> bool:
    """Whether these are encodings of a whole model that leave its embeddings alone."""
    return isinstance(spec, ModelSpec) and all(
        isinstance(e, PositionEncoding) and type(e).embed is PositionEncoding.embed
        for e in encodings
    )


@contextlib.contextmanager
def _scratch(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside the one that is wanted, which becomes it if the block ends well."""
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(
                f"{folder} exists and is not empty: choose another folder, or remove it"
            )
        scratch.mkdir(parents=True)
        yield scratch
        os.rename(scratch, folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror}): make room, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_config(folder: pathlib.Path, hf: Config, model: Model) -> None:
    ends = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"])
    if model.tokenizer is not None:
        ends.update(bos_token_id=model.tokenizer.bos, eos_token_id=model.tokenizer.eos)
        eos, *others = model.tokenizer.stops
        stops = {"eos_token_id": [eos, *others] if others else eos}
        _write_json(folder / "generation_config.json", {**ends, **stops})
    _write_json(folder / CONFIG, {**hf, **ends})


def _write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_text_files(folder: pathlib.Path, model: Model) -> None:
    """The tokenizer's files, from where the config says they are, and the chat template."""
    named = pathlib.Path(model.cfg.data.tokenizer).expanduser()
    home = named if named.is_dir() else named.parent
    if named.suffix == GGUF and isinstance(model.tokenizer, HuggingFace):
        model.tokenizer.save(folder, model.chat_template)
    elif model.tokenizer is not None and named.exists():
        for name in BESIDE:
            if (home / name).is_file():
                shutil.copy(home / name, folder / name)
    if model.chat_template:
        (folder / TEMPLATE).write_text(model.chat_template, encoding="utf-8")


def _write_weights(folder: pathlib.Path, leaves: dict[str, Leaf], params: Any, dtype: str) -> None:
    """One shard after the other, each of whole tensors."""
    from safetensors.numpy import save_file

    flat = {parallel.path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    parts = {name: (paths, place) for name, paths, place in tensors(leaves)}
    sizes = {n: math.prod(s) * DTYPES[dtype].itemsize for n, s in tensor_shapes(leaves).items()}
    shards = _shards(sizes)
    files = [WEIGHTS] if len(shards) == 1 else [_shard(i, len(shards)) for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        inside = {name: _tensor(flat, leaves, *parts[name], dtype) for name in names}
        save_file(inside, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        home = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = {"total_size": sum(sizes.values())}
        _write_json(folder / INDEX, {"metadata": total, "weight_map": home})


def _shard(number: int, of: int) -> str:
    return f"model-{number + 1:05}-of-{of:05}.safetensors"


def _shards(sizes: dict[str, int]) -> list[list[str]]:
    """Names of tensors by shard, each filled as far as it goes."""
    shards, used = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _tensor(
    flat: dict[str, Any],
    leaves: dict[str, Leaf],
    paths: tuple[str, ...],
    place: tuple[int, ...],
    dtype: str,
) -> np.ndarray:
    """A tensor of theirs from the parameters it joins."""
    ours = [np.asarray(flat[at][place]) for at in paths]
    leaf = leaves[paths[0]]
    joined = leaf.weight.form.join(ours, leaf.layer)
    return np.ascontiguousarray(joined.astype(DTYPES[dtype]))
