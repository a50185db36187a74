"""Counts at irregular times: what a recurrence gains by knowing the time, and how it is told.

    lcm reproduce irregular_times [--scale cpu|tiny]

Bursts whose rate decays are counted in intervals of random length, and the count of the next one
is to be foreseen. Mamba-2 knows no more of time than the order of intervals, or their lengths too,
which are embedded or move its clock (IC-Mamba, arXiv:2502.04655): of those before, or of the one
that is asked for as well. All models have as many parameters, and the best that could be done is
known.
"""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lcm import config, models, report
from lcm.data.counts import Counts, DecayingCounts
from lcm.evaluation import recall
from lcm.evaluation.model import scorer
from lcm.evaluation.properties import by_quartile, irregularity
from lcm.nn.intervals import intervals, pace
from lcm.report.tables import Table, captioned, over_seeds, to_text
from lcm.training.workdir import write_text
from lcm.types import Batch

SCALES = ("cpu", "tiny")
SCORED = 1 << 20  # apart from the seeds of training
BAYES_PAST, BAYES = "Bayes, past", "Bayes, next"
QUARTILES = ["least irregular", "second", "third", "most irregular"]


class Model(NamedTuple):
    """Which interval is embedded at t_j, and which one moves the clock: none, the past one, which
    ends there, or the next, which begins and whose count is asked for."""

    embedded: str = ""
    clock: str = ""


# By what is known when a count is asked for: no interval, those before it, or its own as well.
MODELS = {
    "index": Model(),
    "past, embedding": Model("past"),
    "past, clock": Model("", "past"),
    "past, both": Model("past", "past"),
    "next, embedding": Model("next"),
    "next, clock": Model("", "next"),
    "next, both": Model("next", "next"),
    "next, embedding, past, clock": Model("next", "past"),
}


class Scale(NamedTuple):
    """How large a run is: streams of `length` intervals, `times` as many to measure on."""

    models: tuple[str, ...]
    seeds: int
    task: DecayingCounts
    length: int
    times: int
    width: int
    heads: int
    state: int
    rows: int
    steps: int
    streams: int


CPU = Scale(tuple(MODELS), 3, DecayingCounts(), 64, 4, 64, 4, 16, 16, 600, 256)
SOME = "index", "past, clock", "next, both"
TINY = Scale(SOME, 2, DecayingCounts((2.0,), most=4), 8, 2, 16, 2, 4, 4, 4, 8)


def config_of(sizes: Scale, model: Model) -> ConfigDict:
    """Two layers of Mamba-2 without MLPs, that differ in what is added to embeddings alone."""
    shape = recall.training(
        sizes.width, sizes.heads, sizes.task.vocab, sizes.length, sizes.rows, sizes.steps
    )
    layers = (
        "model.mlp=none",
        "model.pattern=mamba2",
        "model.expand=2",
        f"model.state={sizes.state}",
    )
    # Intervals have mean 1; sinusoids are as large as embeddings, whose numbers have size 1 here.
    embedding = (
        *("model.positions=intervals", "model.positions.unit=0.1"),
        *("model.positions.fastest=16", "model.positions.scale=1"),
    )
    encoding = embedding if model.embedded else ("model.positions=nope",)
    return config.override(config.base(), [*shape, *layers, *encoding])


def batch_of(sizes: Scale, model: Model, streams: Counts) -> Batch:
    """Streams with what a model is told of their times; the mean interval is the clock's step."""
    batch = sizes.task.batch(streams)
    segments_BL = batch.context.segments_BL
    past_BL = intervals(streams.times[:, :-1], segments_BL)
    next_BL = np.diff(streams.times).astype(np.float32)
    tau = {"": None, "past": past_BL, "next": next_BL}
    # At the first time no interval is past, and one step is made.
    paces = {**tau, "past": np.asarray(pace(past_BL, segments_BL, reference=1.0))}
    context = batch.context._replace(interval_BL=tau[model.embedded], pace_BL=paces[model.clock])
    return batch._replace(context=context)


def losses(cfg: ConfigDict, params: Any, batch: Batch) -> np.ndarray:
    """Nats of each count, `[B, L]`."""
    return np.asarray(scorer(cfg, params)(batch), np.float64)


def figures(sizes: Scale, streams: Counts, nats_BL: np.ndarray) -> dict[str, list[float]]:
    """Nats of a count by how far into a stream it is, and those beyond what Bayes' rule leaves, by
    quartile of the irregularity of streams, within the length trained on and in the last band."""
    spans = recall.bands(sizes.length, sizes.length * sizes.times)
    above_BL = nats_BL - sizes.task.foreseen(streams)
    uneven_B = [irregularity(times).deviation for times in streams.times]

    def quartiles(a: int, b: int) -> list[float]:
        return [part.value for part in by_quartile(uneven_B, above_BL[:, a:b].mean(1))]

    return {
        "nats": [float(nats_BL[:, a:b].mean()) for a, b in spans],
        "above": [float(above_BL[:, a:b].mean()) for a, b in spans],
        "within": quartiles(*spans[0]),
        "beyond": quartiles(*spans[-1]),
    }


def studied(sizes: Scale, name: str, streams: Counts, folder: pathlib.Path) -> dict[str, Any]:
    """`figures` of each seed; what is finished is read."""
    model = MODELS[name]
    cfg, batch = config_of(sizes, model), batch_of(sizes, model, streams)

    def batch_at(seed: int, step: int) -> Batch:
        own = sizes.task.streams((seed, step), sizes.rows, sizes.length)
        return batch_of(sizes, model, own)

    def score(params: Any) -> dict[str, list[float]]:
        return figures(sizes, streams, losses(cfg, params, batch))

    seeds = recall.studied(cfg, folder, sizes.seeds, batch_at, score)
    return {"seeds": seeds, "parameters": models.parameter_count(cfg)}


def known(sizes: Scale, streams: Counts) -> dict[str, Any]:
    """`figures` of what needs no training, as of one seed."""
    drawn = sizes.task.streams((SCORED + 1,), 8 * sizes.streams, sizes.length)
    rate = drawn.counts_BL.sum() / drawn.times[:, -1].sum()
    nats = {
        "constant rate": sizes.task.at_a_rate(streams, rate),
        BAYES_PAST: sizes.task.foreseen_early(streams),
        BAYES: sizes.task.foreseen(streams),
        "kind told": sizes.task.told(streams),
    }
    return {name: {"seeds": [figures(sizes, streams, each)]} for name, each in nats.items()}


def run(workdir: pathlib.Path, scale: str) -> None:
    """Trains and scores what is not there yet, and writes `results.json` and the page."""
    sizes = {"cpu": CPU, "tiny": TINY}[scale]
    streams = sizes.task.streams((SCORED,), sizes.streams, sizes.length * sizes.times)
    trained = {
        name: studied(sizes, name, streams, workdir / name.replace(", ", "_"))
        for name in sizes.models
    }
    results = {**known(sizes, streams), **trained}
    write_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
    shown = tables(sizes, results)
    write_text(workdir / "tables.md", captioned(shown))
    for table in shown:
        print(f"\n{to_text(table)}")
    text = [
        f"{sizes.steps} steps of {sizes.rows} streams of T={sizes.length} intervals; scored on "
        f"{sizes.streams} streams of {sizes.times} T. Means of {sizes.seeds} seeds, and the most "
        f"that two of them differ by in any column. All have {trained['index']['parameters']:,} "
        "parameters.",
        "Past: the intervals before the one whose count is asked for are known. Next: this one "
        "too. Bayes' rule is that of one who knows the process, and no more of a stream.",
    ]
    more = [
        "By band, and by quartiles of streams by the standard deviation of their intervals. Nats "
        "are those above what Bayes' rule leaves of the same counts, their own intervals known."
    ]
    command = f"lcm reproduce irregular_times --scale {scale} --workdir {workdir}"
    sections = [
        report.Section("The next count, by what is known of time", text, shown[:1]),
        report.Section("Above what can be foreseen", more, shown[1:]),
        report.provenance((), command),
    ]
    page = report.publish(
        sections, workdir / "report.html", title="Counts in intervals of irregular length"
    )
    print(f"\nwrote {page}")


def tables(sizes: Scale, results: dict[str, Any]) -> list[Table]:
    """Nats of a count, and those above Bayes' rule, by band and by quartile of irregularity."""
    bands = recall.band_names(sizes.length, sizes.length * sizes.times)
    asked = {
        "nats": ("Nats of a count by how far into a stream it is", bands),
        "above": (f"Nats above {BAYES}, by how far into a stream", bands),
        "within": (f"Nats above {BAYES} at {bands[0]}, by quartile of irregularity", QUARTILES),
        "beyond": (f"Nats above {BAYES} at {bands[-1]}, by quartile of irregularity", QUARTILES),
    }
    return [
        Table(
            caption,
            ["", *columns, "seeds apart"],
            [
                [name, *over_seeds([seed[key] for seed in one["seeds"]])]
                for name, one in results.items()
                if key == "nats" or name != BAYES
            ],
        )
        for key, (caption, columns) in asked.items()
    ]
