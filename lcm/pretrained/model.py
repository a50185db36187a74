"""A model with all that goes with it, and where it may come from."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lcm import config, models, parallel, training
from lcm.data import tokenizers
from lcm.data.tokenizers import Tokenizer
from lcm.pretrained import chat, names
from lcm.pretrained.assemble import assemble, parameter_dtype
from lcm.pretrained.folder import CONFIG, Folder
from lcm.pretrained.gguf import Gguf
from lcm.training import workdir

GGUF = ".gguf"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


class Model(NamedTuple):
    """A config with parameters that fit it, the tokenizer, and the step it was trained to.

    tokenizer: `None` where the model came without one.
    step: 0 where nobody says.
    chat_template: jinja2 source that turns a conversation into a prompt; empty without one.
    """

    cfg: ConfigDict
    params: Any
    tokenizer: Tokenizer | None
    step: int
    chat_template: str = ""


def load(path: str | pathlib.Path, *, dtype: str = "float32", mesh: Mesh | None = None) -> Model:
    """The model of a workdir (its newest whole checkpoint), a Hugging Face folder, or a .gguf file.

    What is no path is a name: see `names.find`. Nothing there is changed. Change `model.cfg`, such
    as its position encoding, to use the same parameters otherwise.

    dtype: of the parameters, float32 or bfloat16; `cfg.model.dtype` is that of computation.
    mesh: over whose devices the parameters are laid; without one they are on the first.

    Raises:
        CheckpointError: if nothing there can be read.
        ConfigError: if it is a model that lcm does not have.
        DataError: if the tokenizer cannot be read.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        path = names.find(str(path))
    if path.suffix == GGUF and path.is_file():
        return _from_gguf(path, dtype, mesh)
    if _is_hugging_face(path):
        return _from_folder(path, dtype, mesh)
    return _from_workdir(path, dtype, mesh)


def changed(model: Model, overrides: Sequence[str]) -> Model:
    """The model under overrides of its config, with what new encodings learn as it begins.

    Raises:
        ConfigError: for an unknown key, a value that cannot be, or a model of other weights.
    """
    if not overrides:
        return model
    cfg, mesh = config.override(model.cfg, overrides), parallel.of(model.params)

    def adopt(params: Any) -> Any:
        return models.adopt(cfg, params, jax.random.key(cfg.seed))

    if mesh is None:
        adopted = adopt(model.params)
        models.check_params(cfg, adopted)
        return model._replace(cfg=cfg, params=adopted)
    shapes = jax.eval_shape(adopt, model.params)
    models.check_params(cfg, shapes)
    if shapes == jax.eval_shape(lambda params: params, model.params):  # all fit as they are
        return model._replace(cfg=cfg)  # and not a copy, which would need as much memory again
    laid = jax.jit(adopt, out_shardings=parallel.shardings(shapes, mesh))
    return model._replace(cfg=cfg, params=laid(model.params))


def _is_hugging_face(path: pathlib.Path) -> bool:
    """Whether a folder's config is of Hugging Face; a workdir's says nothing of a type."""
    try:
        content = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and bool({"model_type", "architectures"} & content.keys())


def _from_folder(path: pathlib.Path, dtype: str, mesh: Mesh | None) -> Model:
    cfg, params = assemble(Folder(path), dtype=dtype, mesh=mesh)
    cfg.name = path.resolve().name
    template = chat.template_of(path)
    if not any((path / name).is_file() for name in TOKENIZERS):
        return Model(cfg, params, None, 0, template)
    cfg.data.tokenizer = str(path)
    return Model(cfg, params, tokenizers.load(str(path)), 0, template)


def _from_gguf(path: pathlib.Path, dtype: str, mesh: Mesh | None) -> Model:
    source = Gguf(path)
    metadata = source.header.metadata
    cfg, params = assemble(source, dtype=dtype, mesh=mesh)
    cfg.name = path.stem
    template = metadata.get("tokenizer.chat_template", "")
    if "tokenizer.ggml.model" not in metadata:
        return Model(cfg, params, None, 0, template)
    cfg.data.tokenizer = str(path)
    return Model(cfg, params, tokenizers.from_gguf(source.header), 0, template)


def _from_workdir(path: pathlib.Path, dtype: str, mesh: Mesh | None) -> Model:
    cfg = workdir.read_config(path)
    params, step = training.restore_params(path, training.abstract_state(cfg, mesh))
    params = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: leaf.astype(parameter_dtype(parallel.path(keys), dtype)), params
    )
    return Model(cfg, params, tokenizers.load(cfg.data.tokenizer), step)
