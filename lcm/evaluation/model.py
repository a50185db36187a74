"""From a trained run to the scores that an evaluation needs."""

import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from lcm import config, models, parallel
from lcm.data import pipeline, tasks
from lcm.data.tokenizers import Tokenizer
from lcm.evaluation import spread
from lcm.evaluation.documents import Document, EvaluationError, from_text_tokens
from lcm.evaluation.likelihood import of_tokens
from lcm.evaluation.perplexity import evaluate
from lcm.evaluation.results import save
from lcm.models import ModelSpec, decoder
from lcm.ops.placed import axes_in_use
from lcm.parallel import hosts
from lcm.pretrained import Model, changed, load
from lcm.types import Array, Batch


def scorer(cfg: Any, params: Any) -> Callable[[Batch], Array]:
    """Next-token losses of a model: `score(batch)` gives float32 nats `[B, L]`.

    One compilation per shape, shared between models of one config. Parameters that lie on a mesh
    are used there, by all processes together, which then all have the losses.
    """
    spec, mesh = models.spec(cfg), parallel.of(params)
    over = mesh and spread.compiled(_of_spec(spec), mesh)

    def score(batch: Batch) -> Array:
        models.check_limit(spec, batch.tokens_BL.shape[1])
        return spread.losses(over, params, batch) if over else _losses(spec, params, batch)

    return score


@functools.cache
def _of_spec(spec: ModelSpec) -> Callable[[Any, Batch], Array]:
    return functools.partial(_nll, spec)


def _nll(spec: ModelSpec, params: Any, batch: Batch) -> Array:
    """Losses `[B, L]`; those of each device's tokens are made there."""
    x_BLD, _ = decoder.hidden(spec, params, batch.tokens_BL, batch.context, None)
    name = "embedding" if spec.tied else "head"

    def own(output: Any, x_BLD: Array, targets_BL: Array) -> Array:
        x_QD, target_Q = x_BLD.reshape(-1, x_BLD.shape[-1]), targets_BL.reshape(-1)
        return -of_tokens(spec, output, x_QD, target_Q)[0].reshape(targets_BL.shape)

    given = {name: params[name]}, x_BLD, batch.targets_BL
    axes = axes_in_use()
    cut = {axis for axis in ("data", "fsdp", "context") if axis in axes}
    if math.prod(axes[axis] for axis in cut) == 1:
        return own(*given)
    whole, rows = PartitionSpec(), parallel.BATCH
    mapped = {"in_specs": (whole, rows, rows), "out_specs": rows, "axis_names": cut}
    return jax.shard_map(own, **mapped, check_vma=False)(*given)


_losses = jax.jit(_nll, static_argnums=0)


def heldout(cfg: Any, tokenizer: Tokenizer | None) -> list[Document]:
    """The held-out documents of a config as tokens.

    Raises:
        DataError: if there are none.
        EvaluationError: without a tokenizer, or if they have prompts, whose loss would count here.
    """
    if tokenizer is None:
        raise EvaluationError(
            "the model came without a tokenizer, which documents need: give it one, as in "
            "model._replace(tokenizer=lcm.data.tokenizers.load(path))"
        )
    if tasks.is_task(cfg.data.source):
        raise EvaluationError(
            f"data.source={cfg.data.source} has prompts and answers, not documents to read: "
            "score it with lcm.evaluation.exact_match"
        )
    return [
        from_text_tokens(
            document.name,
            tokenizer.encode(document.text),
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            text_bytes=len(document.text.encode("utf-8")),
        )
        for document in pipeline.documents(cfg.data, "heldout")
    ]


def evaluate_model(model: Model, *, title: str = "evaluate") -> dict[str, Any]:
    """Runs `evaluate` by the `eval` section of the model's config, on its held-out documents.

    Raises:
        UserError: if a length does not fit the model, or the documents do not reach it.
    """
    cfg = model.cfg
    config.check_keys(cfg)
    models.check_params(cfg, model.params)
    spec, length = models.spec(cfg), cfg.data.length
    models.check_backend(spec)
    models.check_limit(spec, max(round(m * length) for m in cfg.eval.multiples))
    documents = spread.read_by_all(lambda: heldout(cfg, model.tokenizer))
    with hosts.shown(title) as report:
        return evaluate(
            scorer(cfg, model.params),
            documents,
            train_length=length,
            multiples=cfg.eval.multiples,
            stride=cfg.eval.stride or None,
            batch_tokens=cfg.eval.batch_tokens,
            max_tokens=cfg.eval.tokens or None,
            seed=cfg.seed,
            rows=spread.rows(model.params),
            progress=report,
            about=about(model),
        )


def about(model: Model) -> dict[str, Any]:
    """What a result says of the model it is of."""
    return {
        "run": model.cfg.name,
        "step": model.step,
        "parameters": models.parameter_count(model.cfg),
        "tokenizer": model.cfg.data.tokenizer,
        "positions": model.cfg.model.positions.name,
    }


def evaluate_run(
    folder: str | pathlib.Path, overrides: Sequence[str] = (), *, everywhere: bool = False
) -> pathlib.Path:
    """Evaluates a workdir's newest checkpoint and writes `eval/step-N.json` there.

    With overrides of the config the file's name carries them, so that variants lie side by side.

    everywhere: over the mesh of all devices, of other processes too, which all call it; else on
        one device.

    Raises:
        UserError: if the run cannot be read, or cannot be evaluated so.
    """
    folder = pathlib.Path(folder)
    if everywhere:
        model = spread.over_mesh(load(folder, mesh=spread.mesh(folder, overrides)), overrides)
    else:
        model = changed(load(folder), overrides)
    result = evaluate_model(model, title=f"evaluate {folder.name}")
    file = folder / "eval" / f"step-{model.step}{variant(overrides)}.json"
    hosts.by_first(lambda: save(result, file))
    return file


def variant(overrides: Sequence[str]) -> str:
    """What a result's file name says of overrides; those of `eval` and `mesh` change no model."""
    return "".join(f"-{_safe(o)}" for o in overrides if not o.startswith(("eval.", "mesh.")))


def _safe(assignment: str) -> str:
    return "".join(c if c.isalnum() or c in ".=_" else "_" for c in assignment)
