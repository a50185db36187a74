"""Associative recall against the size of a state: how many pairs it holds.

    lcm reproduce mqar [--scale cpu|tiny]

Multi-query associative recall (Arora et al., 2023, arXiv:2312.04927): keys and values are told, and
asked for in another order. A recurrent model has them in its state alone.
"""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lcm import config, models, report
from lcm.data.streams import Mqar
from lcm.evaluation import recall
from lcm.report.tables import Table, number
from lcm.training.seeds import one_seed, train_seeds
from lcm.training.workdir import write_text
from lcm.types import Batch

SCALES = ("cpu", "tiny")
SCORED = 1 << 20  # apart from the seeds of training


class Scale(NamedTuple):
    """How large a run is: trained on `pairs` in rows of `length`, scored on each of `tested`."""

    mixers: tuple[str, ...]
    states: tuple[int, ...]
    pairs: int
    tested: tuple[int, ...]
    keys: int
    length: int
    width: int
    heads: int
    rows: int
    steps: int
    scored: int


CPU = Scale(("mamba2",), (32, 8, 2), 4, (2, 4, 8, 16), 16, 24, 64, 4, 32, 700, 256)
TINY = Scale(("mamba2",), (2, 4), 2, (1, 2), 4, 8, 16, 2, 4, 4, 8)


def config_of(sizes: Scale, mixer: str, state: int) -> ConfigDict:
    """Two layers without MLPs that differ in N alone."""
    shape = recall.training(
        sizes.width, sizes.heads, 2 * sizes.keys + 1, sizes.length, sizes.rows, sizes.steps
    )
    layers = "model.mlp=none", f"model.pattern={mixer}", "model.expand=2", f"model.state={state}"
    rate = "train.schedule=cosine", "train.final_lr=0.1"
    return config.override(config.base(), [*shape, *layers, *rate])


def studied(sizes: Scale, mixer: str, state: int, folder: pathlib.Path) -> dict[str, Any]:
    """Accuracy by number of pairs; what is finished is read."""
    file = folder / "score.json"
    if file.exists():
        return json.loads(file.read_text())
    cfg, task = config_of(sizes, mixer, state), Mqar(sizes.pairs, sizes.keys)

    def batch_at(seed: int, step: int) -> Batch:
        return task.batch((seed, step), sizes.rows, sizes.length)

    stacked = train_seeds(cfg, folder, [0], batch_at, title=f"{mixer}, N={state}")
    params = one_seed(stacked, 0)
    found: dict[str, Any] = {"accuracy": {}, "parameters": models.parameter_count(cfg)}
    for pairs in sizes.tested:
        length = max(sizes.length, 4 * pairs)
        batch = Mqar(pairs, sizes.keys).batch((SCORED,), sizes.scored, length)
        right_BL, asked_BL = recall.answered(cfg, params, batch, rows=64)
        found["accuracy"][str(pairs)] = float(right_BL.sum() / np.sum(asked_BL))
    write_text(file, json.dumps(found, indent=1) + "\n")
    return found


def run(workdir: pathlib.Path, scale: str) -> None:
    """Trains and scores what is not there yet, and writes `results.json` and the page."""
    sizes = {"cpu": CPU, "tiny": TINY}[scale]
    results, rows = {}, []
    header = ["", "numbers of a state", "parameters", *(f"{n} pairs" for n in sizes.tested)]
    for mixer in sizes.mixers:
        for state in sizes.states:
            name = f"{mixer}, N={state}"
            one = results[name] = studied(sizes, mixer, state, workdir / f"{mixer}_{state}")
            accuracy = [number(x, 3) for x in one["accuracy"].values()]
            rows.append([name, f"{2 * state * sizes.width:,}", f"{one['parameters']:,}", *accuracy])
            print(f"{name:24}" + "".join(f"{word:>10}" for word in rows[-1][1:]))
    write_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
    text = [
        f"Trained on {sizes.pairs} pairs of {sizes.keys} keys and values, {sizes.steps} steps of "
        f"{sizes.rows} rows; a state has N numbers for each of {2 * sizes.width} channels a layer. "
        f"By chance {1 / sizes.keys:.3f} are right."
    ]
    table = Table("Accuracy by pairs, those trained on and others", header, rows)
    command = f"lcm reproduce mqar --scale {scale} --workdir {workdir}"
    sections = [
        report.Section("Recall against the size of the state", text, [table]),
        report.provenance((), command),
    ]
    page = report.publish(
        sections, workdir / "report.html", title="Associative recall and the size of a state"
    )
    print(f"\nwrote {page}")
