"""Associative recall against the size of a state, and what is done to it when it is written to.

    lcm reproduce mqar [--scale cpu|tiny]

Multi-query associative recall (Arora et al., 2023, arXiv:2312.04927): keys and values are told, and
asked for in another order. A recurrent model has them in its state alone, of which Mamba-2 forgets
by a decay, DeltaNet by erasing what a key had, Gated DeltaNet by both, linear attention nothing.
"""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lcm import config, models, report
from lcm.data.streams import Mqar
from lcm.evaluation import recall
from lcm.report.tables import Table, captioned, over_seeds
from lcm.training.workdir import write_text
from lcm.types import Batch

SCALES = ("cpu", "tiny")
SCORED = 1 << 20  # apart from the seeds of training


class Scale(NamedTuple):
    """How large a run is: trained on `pairs` in rows of `length`, scored on each of `tested`."""

    mixers: tuple[str, ...]
    states: tuple[int, ...]
    seeds: int
    pairs: int
    tested: tuple[int, ...]
    keys: int
    length: int
    width: int
    heads: int
    rows: int
    steps: int
    scored: int


MIXERS = "linear_attention", "mamba2", "deltanet", "gated_deltanet"  # by what they forget
CPU = Scale(MIXERS, (2, 8, 32), 3, 4, (2, 4, 8, 16), 16, 24, 64, 4, 32, 700, 256)
TINY = Scale(("mamba2", "linear_attention"), (2,), 2, 2, (1, 2), 4, 8, 16, 2, 4, 4, 8)


def config_of(sizes: Scale, mixer: str, state: int) -> ConfigDict:
    """Two layers without MLPs that differ in the mixer and N alone."""
    shape = recall.training(
        sizes.width, sizes.heads, 2 * sizes.keys + 1, sizes.length, sizes.rows, sizes.steps
    )
    layers = "model.mlp=none", f"model.pattern={mixer}", "model.expand=2", f"model.state={state}"
    rate = "train.schedule=cosine", "train.final_lr=0.1"
    return config.override(config.base(), [*shape, *layers, *rate])


def studied(sizes: Scale, mixer: str, state: int, folder: pathlib.Path) -> dict[str, Any]:
    """Accuracy of each seed by number of pairs, and sizes; what is finished is read."""
    cfg, task = config_of(sizes, mixer, state), Mqar(sizes.pairs, sizes.keys)

    def batch_at(seed: int, step: int) -> Batch:
        return task.batch((seed, step), sizes.rows, sizes.length)

    def score(params: Any) -> dict[str, list[float]]:
        return {"accuracy": [accuracy(sizes, cfg, params, pairs) for pairs in sizes.tested]}

    return {
        "seeds": recall.studied(cfg, folder, sizes.seeds, batch_at, score),
        "kept": recall.kept(cfg),
        "parameters": models.parameter_count(cfg),
    }


def accuracy(sizes: Scale, cfg: ConfigDict, params: Any, pairs: int) -> float:
    """The share of answers that is right in rows of so many pairs."""
    length = max(sizes.length, 4 * pairs)
    batch = Mqar(pairs, sizes.keys).batch((SCORED,), sizes.scored, length)
    right_BL, asked_BL = recall.answered(cfg, params, batch, rows=64)
    return float(right_BL.sum() / np.sum(asked_BL))


def run(workdir: pathlib.Path, scale: str) -> None:
    """Trains and scores what is not there yet, and writes `results.json` and the page."""
    sizes = {"cpu": CPU, "tiny": TINY}[scale]
    results, rows = {}, []
    tested = [f"{n} (trained)" if n == sizes.pairs else str(n) for n in sizes.tested]
    header = ["", "states", "convolutions", "parameters", *tested, "seeds apart"]
    for mixer in sizes.mixers:
        for state in sizes.states:
            name = f"{mixer}, N={state}"
            one = results[name] = studied(sizes, mixer, state, workdir / f"{mixer}_{state}")
            figures = over_seeds([seed["accuracy"] for seed in one["seeds"]])
            counts = [f"{count:,}" for count in (*one["kept"], one["parameters"])]
            rows.append([name, *counts, *figures])
            print(" | ".join(rows[-1]), flush=True)
    write_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
    table = Table("Accuracy by pairs of a row", header, rows)
    write_text(workdir / "tables.md", captioned([table]))
    text = [
        f"Trained on {sizes.pairs} pairs of {sizes.keys} keys and values, {sizes.steps} steps of "
        f"{sizes.rows} rows; a layer has N numbers for each of {2 * sizes.width} channels. What "
        f"states and convolutions keep is of both layers. By chance {1 / sizes.keys:.3f} are "
        f"right. Means of {sizes.seeds} seeds, and the most that two differ by in any column."
    ]
    command = f"lcm reproduce mqar --scale {scale} --workdir {workdir}"
    sections = [
        report.Section("Recall against the size of the state", text, [table]),
        report.provenance((), command),
    ]
    page = report.publish(
        sections, workdir / "report.html", title="Associative recall and the size of a state"
    )
    print(f"\nwrote {page}")
