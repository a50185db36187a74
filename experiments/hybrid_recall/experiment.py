"""A hybrid against its pure parents: one layer of attention among recurrent ones, at equal size.

    lcm reproduce hybrid_recall [--scale cpu|tiny]

Two layers on overwrite recall, trained on short pieces and scored far beyond: Mamba-2 twice,
attention twice, and Mamba-2 below attention, with and without positions (those of Jamba and others
have none, as recurrence carries them).
"""

import json
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lcm import config, models, report
from lcm.data.streams import OverwriteRecall
from lcm.evaluation import recall
from lcm.report.tables import Table, number
from lcm.training.seeds import one_seed, train_seeds
from lcm.training.workdir import write_text
from lcm.types import Batch

SCALES = ("cpu", "tiny")
SCORED = 1 << 20  # apart from the seeds of training
# Patterns, m being Mamba-2, r attention with RoPE and n attention without positions.
MODELS = {"mm": "m,m", "mr": "m,r", "mn": "m,n", "rr": "r,r"}


class Scale(NamedTuple):
    """How large a run is; `hidden` is that of the MLPs behind attention, with which all models have
    as many parameters as Mamba-2 alone, nearly."""

    keys: int
    length: int
    times: int
    width: int
    heads: int
    state: int
    hidden: int
    rows: int
    steps: int
    streams: int


CPU = Scale(16, 32, 32, 64, 4, 32, 70, 16, 700, 16)
TINY = Scale(4, 8, 4, 16, 2, 4, 16, 4, 4, 4)


def config_of(sizes: Scale, pattern: str) -> ConfigDict:
    """Two layers of the kinds of a pattern."""
    recurrent = (
        *("model.kinds.m.mixer=mamba2", "model.kinds.m.mlp=none", "model.kinds.m.expand=2"),
        f"model.kinds.m.state={sizes.state}",
    )
    attention = [
        assignment
        for kind, positions in (("r", "rope"), ("n", "nope"))
        for assignment in (
            f"model.kinds.{kind}.mixer=attention",
            f"model.kinds.{kind}.positions={positions}",
            f"model.kinds.{kind}.hidden={sizes.hidden}",
        )
        if kind in pattern
    ]
    shape = recall.training(
        sizes.width, sizes.heads, 3 * sizes.keys, sizes.length, sizes.rows, sizes.steps
    )
    mamba = recurrent if "m" in pattern else ()
    assigned = [*shape, *mamba, *attention, f"model.pattern={pattern}"]
    return config.override(config.base(), assigned)


def studied(sizes: Scale, pattern: str, folder: pathlib.Path) -> dict[str, Any]:
    """Accuracy by band; what is finished is read."""
    file = folder / "score.json"
    if file.exists():
        return json.loads(file.read_text())
    cfg, task = config_of(sizes, pattern), OverwriteRecall(sizes.keys)

    def batch_at(seed: int, step: int) -> Batch:
        return task.batch(task.rows((seed, step), sizes.rows, sizes.length))

    params = one_seed(train_seeds(cfg, folder, [0], batch_at, title=folder.name), 0)
    longest = sizes.length * sizes.times
    rows = task.rows((SCORED,), sizes.streams, longest)
    pair = recall.answered(cfg, params, task.batch(rows))
    found = {
        "accuracy": recall.by_band(*pair, recall.bands(sizes.length, longest)),
        "parameters": models.parameter_count(cfg),
    }
    write_text(file, json.dumps(found, indent=1) + "\n")
    return found


def run(workdir: pathlib.Path, scale: str) -> None:
    """Trains and scores what is not there yet, and writes `results.json` and the page."""
    sizes = {"cpu": CPU, "tiny": TINY}[scale]
    results = {name: studied(sizes, text, workdir / name) for name, text in MODELS.items()}
    write_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
    names = recall.band_names(sizes.length, sizes.length * sizes.times)
    rows = [
        [name, f"{one['parameters']:,}", *(number(x, 3) for x in one["accuracy"])]
        for name, one in results.items()
    ]
    table = Table("Accuracy by how far into a stream it is asked", ["", "parameters", *names], rows)
    for row in (table.header, *table.rows):
        print(f"{row[0]:6}" + "".join(f"{word:>11}" for word in row[1:]))
    text = [
        f"{sizes.steps} steps of {sizes.rows} pieces of T={sizes.length} tokens, {sizes.keys} "
        "keys; m is Mamba-2, r attention with RoPE, n attention without positions. One seed."
    ]
    command = f"lcm reproduce hybrid_recall --scale {scale} --workdir {workdir}"
    sections = [
        report.Section("Recall beyond the length trained on", text, [table]),
        report.provenance((), command),
    ]
    page = report.publish(sections, workdir / "report.html", title="A hybrid and its parents")
    print(f"\nwrote {page}")
