"""`lcm evaluate --model`: a pretrained model at lengths in tokens, its results in a workdir.

Losses and answers are kept as they come, so that the same command goes on where it was stopped and
computes for further lengths what is missing alone.
"""

import pathlib
from collections.abc import Sequence

from lcm import models
from lcm.errors import UserError
from lcm.evaluation import passkey, spread
from lcm.evaluation.memory import Losses, identity
from lcm.evaluation.model import about, heldout, scorer, variant
from lcm.evaluation.perplexity import evaluate
from lcm.evaluation.results import save
from lcm.parallel import hosts
from lcm.pretrained import Model, changed, load
from lcm.training.workdir import CONFIG, write_text

LOSSES = "losses"  # folder of the kept losses, within eval/
MULTIPLES = "eval.multiples"


def evaluate_pretrained(
    source: str,
    overrides: Sequence[str] = (),
    *,
    lengths: Sequence[int] = (),
    workdir: pathlib.Path | None = None,
    dtype: str = "float32",
    retrieval: bool = False,
    everywhere: bool = False,
) -> tuple[pathlib.Path, pathlib.Path]:
    """Loss by length and position of a model, or passkeys that it retrieves; the workdir, the file.

    source: what `lcm.load` takes.
    lengths: of windows, or of prompts, in tokens. Without them, `eval.multiples` of the trained
        length if that is overridden, else half of it, the whole, and twice as much.
    workdir: `runs/NAME` by default.
    retrieval: passkeys rather than losses; not everywhere.
    everywhere: over the mesh of all devices, of other processes too, which all call it.

    Raises:
        UserError: if the model cannot be read, or not evaluated so.
    """
    if everywhere:
        mesh = spread.mesh(source, overrides, *lengths, workdir, dtype)
        plain = load(source, dtype=dtype, mesh=mesh)
        model = spread.over_mesh(plain, overrides)
    else:
        plain = load(source, dtype=dtype)
        model = changed(plain, overrides)
    folder = workdir or pathlib.Path("runs") / plain.cfg.name
    lengths = sorted({*(lengths or _usual(model, overrides))})
    _check(model, folder, lengths)
    hosts.by_first(lambda: _begin(plain, folder))
    if retrieval:
        file = folder / "eval" / f"passkey{variant(overrides)}.json"
        passkey.retrieve(model, lengths, file=file, title=f"passkey {folder.name}")
        return folder, file
    file = folder / "eval" / f"step-{model.step}{variant(overrides)}.json"
    result = by_length(model, lengths, folder / "eval" / LOSSES, title=f"evaluate {folder.name}")
    hosts.by_first(lambda: save(result, file))
    return folder, file


def _begin(model: Model, folder: pathlib.Path) -> None:
    """Writes the config of the model as it came, once."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG).exists():
        write_text(folder / CONFIG, model.cfg.to_json_best_effort(indent=2) + "\n")


def by_length(model: Model, lengths: Sequence[int], kept: pathlib.Path, *, title: str) -> dict:
    """`evaluate` at lengths in tokens, on the held-out documents of the model's config.

    Documents hold the longest of the lengths, and twice the trained one: further lengths up to
    there share them, and so what is kept.

    Raises:
        UserError: if the documents do not reach the lengths.
    """
    cfg, trained = model.cfg, model.cfg.data.length
    documents = spread.read_by_all(lambda: heldout(cfg, model.tokenizer))
    span, most = max(*lengths, 2 * trained), cfg.eval.tokens or None
    if all(len(document.tokens_N) < span for document in documents) or span > (most or span):
        span = 0  # those of the longest length, then
    with hosts.shown(title) as report:
        return evaluate(
            scorer(cfg, model.params),
            documents,
            train_length=trained,
            multiples=[length / trained for length in lengths],
            batch_tokens=cfg.eval.batch_tokens,
            max_tokens=most,
            seed=cfg.seed,
            rows=spread.rows(model.params),
            span=span,
            protocols=("lengths",),
            memory=Losses(kept, identity(model)),
            progress=report,
            about=about(model),
        )


def _usual(model: Model, overrides: Sequence[str]) -> list[int]:
    trained = model.cfg.data.length
    if any(override.startswith(MULTIPLES) for override in overrides):
        return [multiple * trained for multiple in model.cfg.eval.multiples]
    return [max(1, trained // 2), trained, 2 * trained]


def _check(model: Model, folder: pathlib.Path, lengths: Sequence[int]) -> None:
    """Refuses what cannot be, before anything is computed."""
    if lengths[0] < 1:
        raise UserError(f"--lengths {lengths[0]} must be 1 or more tokens")
    models.check_backend(models.spec(model.cfg))
    models.check_limit(models.spec(model.cfg), lengths[-1])
    if model.tokenizer is None:
        raise UserError("this model came without a tokenizer: put a tokenizer.json beside it")
    if (folder / "checkpoints").exists():
        raise UserError(
            f"{folder} is the workdir of a training run: give another --workdir, or evaluate that "
            f"run by lcm evaluate {folder}"
        )
