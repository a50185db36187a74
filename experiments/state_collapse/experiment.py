"""States that grow beyond the length trained on, and how that goes with their size.

    lcm reproduce state_collapse [--scale cpu|tiny]

Chen et al. (2024, arXiv:2410.07145): a state that is large for the length of training never has to
forget, and past that length it collapses. Mamba-2 of several N learns overwrite recall in short
pieces and reads far longer streams; norms of its states are measured on the way.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lcm import config, models, report
from lcm.data.streams import OverwriteRecall
from lcm.evaluation import recall
from lcm.evaluation.remembrance import state_norms
from lcm.report.tables import Table, captioned, number, over_seeds
from lcm.training.workdir import write_text
from lcm.types import Batch

SCALES = ("cpu", "tiny")
SCORED = 1 << 20  # apart from the seeds of training


class Scale(NamedTuple):
    """How large a run is: pieces of `length` tokens, streams of `times` as many to measure on."""

    states: tuple[int, ...]
    seeds: int
    keys: int
    length: int
    times: int
    width: int
    heads: int
    rows: int
    steps: int
    streams: int


CPU = Scale((8, 32, 128), 3, 16, 32, 32, 64, 4, 16, 700, 16)
TINY = Scale((2,), 2, 4, 8, 4, 16, 2, 4, 4, 4)


def config_of(sizes: Scale, state: int) -> ConfigDict:
    """Two layers of Mamba-2 that differ in N alone."""
    shape = recall.training(
        sizes.width, sizes.heads, 3 * sizes.keys, sizes.length, sizes.rows, sizes.steps
    )
    layers = "model.mlp=none", "model.pattern=mamba2", "model.expand=2", f"model.state={state}"
    return config.override(config.base(), [*shape, *layers])


def studied(sizes: Scale, state: int, folder: pathlib.Path) -> dict[str, Any]:
    """Accuracy of each seed by band, norms of its states by layer and place, and sizes; what is
    finished is read."""
    cfg, task = config_of(sizes, state), OverwriteRecall(sizes.keys)
    longest = sizes.length * sizes.times
    rows = task.rows((SCORED,), sizes.streams, longest)

    def batch_at(seed: int, step: int) -> Batch:
        return task.batch(task.rows((seed, step), sizes.rows, sizes.length))

    def score(params: Any) -> dict[str, list]:
        pair = recall.answered(cfg, params, task.batch(rows))
        (norms,) = state_norms(cfg, params, rows, sizes.length)
        return {
            "accuracy": recall.by_band(*pair, recall.bands(sizes.length, longest)),
            "norms": norms.mean((2, 3)).T.tolist(),
        }

    return {
        "seeds": recall.studied(cfg, folder, sizes.seeds, batch_at, score),
        "numbers": sum(recall.kept(cfg)),
        "parameters": models.parameter_count(cfg),
    }


def forgets_after(numbers: int) -> float:
    """Tokens of training from which a state of so many numbers learns to forget, by the paper's
    line: 5.172 S - 4.469 thousand for S million, where that is more than nothing."""
    return max(0.0, 5172 * numbers / 1e6 - 4469)


def norms_of(seeds: Sequence[dict[str, Any]], layer: int, places: Sequence[int]) -> list[str]:
    """Norms of a layer's states after so many times T, how far seeds lie apart, and the
    largest ratio in any seed of the norm in the last place to that in the first."""
    norms = [[seed["norms"][layer][place - 1] for place in places] for seed in seeds]
    return [*over_seeds(norms, 1), number(max(each[-1] / each[0] for each in norms), 2)]


def run(workdir: pathlib.Path, scale: str) -> None:
    """Trains and measures what is not there yet, and writes `results.json` and the page."""
    sizes = {"cpu": CPU, "tiny": TINY}[scale]
    results = {f"N={n}": studied(sizes, n, workdir / f"N{n}") for n in sizes.states}
    write_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
    names = recall.band_names(sizes.length, sizes.length * sizes.times)
    places = [2**n for n in range(sizes.times.bit_length())]
    accuracy = [
        [name, f"{one['numbers']:,}", *over_seeds([seed["accuracy"] for seed in one["seeds"]])]
        for name, one in results.items()
    ]
    norms = [
        [f"{name}, layer {i + 1}", *norms_of(one["seeds"], i, places)]
        for name, one in results.items()
        for i in range(len(one["seeds"][0]["norms"]))
    ]
    tables = [
        Table(
            "Accuracy by how far into a stream it is asked",
            ["", "numbers kept", *names, "seeds apart"],
            accuracy,
        ),
        Table(
            "Mean norm of a head's state after",
            ["", *(f"{n} T" for n in places), "seeds apart", "largest growth"],
            norms,
        ),
    ]
    write_text(workdir / "tables.md", captioned(tables))
    for table in tables:
        print(f"\n{table.caption}")
        for row in (table.header, *table.rows):
            print(f"{row[0]:18}" + "".join(f"{word:>15}" for word in row[1:]))
    most = max(r["numbers"] for r in results.values())
    text = [
        f"Mamba-2 trained on {sizes.steps} steps of {sizes.rows} pieces of T={sizes.length} tokens "
        f"with {sizes.keys} keys; states of up to {most:,} numbers. The paper's line for the "
        f"training length from which a model forgets is of millions of them, and gives "
        f"{forgets_after(most):,.0f} tokens here: it says nothing at this scale. "
        f"Means of {sizes.seeds} seeds, and the most that two of them differ by in any column; the "
        f"largest growth of norms is from T to {sizes.times} T in one seed."
    ]
    command = f"lcm reproduce state_collapse --scale {scale} --workdir {workdir}"
    sections = [
        report.Section("Norms beyond the length trained on", text, tables),
        report.provenance((), command),
    ]
    page = report.publish(sections, workdir / "report.html", title="States past their training")
    print(f"\nwrote {page}")
