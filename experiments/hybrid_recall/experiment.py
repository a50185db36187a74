"""A hybrid against its pure parents: one layer of attention among recurrent ones, at equal size.

    lcm reproduce hybrid_recall [--scale cpu|tiny]

Two layers on overwrite recall, trained on short pieces and scored far beyond: Mamba-2 twice,
attention twice, and Mamba-2 below attention, with and without positions (those of Jamba and others
have none, as recurrence carries them). Then, without more training, either side is extended, and
both: rotations of attention are scaled, steps of the recurrence shortened.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lcm import config, models, report
from lcm.data.streams import OverwriteRecall
from lcm.evaluation import recall
from lcm.report.tables import Table, captioned, over_seeds
from lcm.training.workdir import write_text
from lcm.types import Batch

SCALES = ("cpu", "tiny")
SCORED = 1 << 20  # apart from the seeds of training
# Patterns, m being Mamba-2, r attention with RoPE and n attention without positions.
MODELS = {"mm": "m,m", "mr": "m,r", "mn": "m,n", "rr": "r,r"}
# What is done to which model: by a factor s rotations are those of YaRN for s T tokens, and steps
# are s times as short.
ROTATIONS = "model.kinds.r.positions=yarn", "model.kinds.r.positions.factor={s}"
STEPS = ("model.kinds.m.extension=step={share}",)
UNSCALED = "model.kinds.r.positions.attention_factor=1.0"  # YaRN's frequencies, scores as they are
SIDES = {
    "mm": {"steps": STEPS},
    "mr": {
        "rotations": ROTATIONS,
        "steps": STEPS,
        "frequencies": (*ROTATIONS, UNSCALED),
        "both": (*ROTATIONS, *STEPS),
    },
}


class Scale(NamedTuple):
    """How large a run is; `hidden` is that of the MLPs behind attention, with which all models have
    as many parameters as Mamba-2 alone, nearly."""

    seeds: int
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


CPU = Scale(3, 16, 32, 32, 64, 4, 32, 70, 16, 700, 16)
TINY = Scale(2, 4, 8, 2, 16, 2, 4, 16, 4, 4, 4)


def config_of(sizes: Scale, pattern: str) -> ConfigDict:
    """Two layers of the kinds of a pattern."""
    recurrent = (
        *("model.kinds.m.mixer=mamba2", "model.kinds.m.mlp=none", "model.kinds.m.expand=2"),
        f"model.kinds.m.state={sizes.state}",
    )
    attention = [
        assignment
        for kind, encoding in (("r", "rope"), ("n", "nope"))
        for assignment in (
            f"model.kinds.{kind}.mixer=attention",
            f"model.kinds.{kind}.positions={encoding}",
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


def extended(sizes: Scale, name: str, side: str, s: int) -> ConfigDict:
    """The model with a side, or both, extended to s times the length."""
    assigned = [each.format(s=s, share=1 / s) for each in SIDES[name][side]]
    return config.override(config_of(sizes, MODELS[name]), assigned)


def studied(sizes: Scale, name: str, folder: pathlib.Path) -> dict[str, Any]:
    """Accuracy of each seed by band, as trained and extended; what is finished is read."""
    cfg, task = config_of(sizes, MODELS[name]), OverwriteRecall(sizes.keys)
    longest = sizes.length * sizes.times
    batch = task.batch(task.rows((SCORED,), sizes.streams, longest))
    spans = recall.bands(sizes.length, longest)

    def batch_at(seed: int, step: int) -> Batch:
        return task.batch(task.rows((seed, step), sizes.rows, sizes.length))

    def accuracy(cfg: ConfigDict, params: Any) -> list[float]:
        return recall.by_band(*recall.answered(cfg, params, batch), spans)

    def score(params: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"accuracy": accuracy(cfg, params), "extended": {}}
        for side in SIDES.get(name, ()):
            found["extended"][side] = {
                str(s): accuracy(extended(sizes, name, side, s), params) for s in factors(sizes)
            }
        return found

    seeds = recall.studied(cfg, folder, sizes.seeds, batch_at, score)
    return {"seeds": seeds, "parameters": models.parameter_count(cfg)}


def factors(sizes: Scale) -> list[int]:
    """What the bands beyond T ask for: their ends over T."""
    return [2**n for n in range(1, sizes.times.bit_length())]


def run(workdir: pathlib.Path, scale: str) -> None:
    """Trains and scores what is not there yet, and writes `results.json` and the page."""
    sizes = {"cpu": CPU, "tiny": TINY}[scale]
    results = {name: studied(sizes, name, workdir / name) for name in MODELS}
    write_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
    shown = tables(sizes, results)
    write_text(workdir / "tables.md", captioned(shown))
    for table in shown:
        print(f"\n{table.caption}")
        for row in (table.header, *table.rows):
            print(f"{row[0]:24}" + "".join(f"{word:>12}" for word in row[1:]))
    text = [
        f"{sizes.steps} steps of {sizes.rows} pieces of T={sizes.length} tokens, {sizes.keys} "
        "keys; m is Mamba-2, r attention with RoPE, n attention without positions. Means of "
        f"{sizes.seeds} seeds, and the most that two of them differ by in any band."
    ]
    more = [
        "The same parameters: rotations are those of YaRN for s T tokens, which has sharper scores "
        "too (frequencies: without), steps of Mamba-2 s times as short. In the last row of each "
        "side every band has the s that its end asks for."
    ]
    command = f"lcm reproduce hybrid_recall --scale {scale} --workdir {workdir}"
    sections = [
        report.Section("Recall beyond the length trained on", text, shown[:1]),
        report.Section("Either side extended, and both", more, shown[1:]),
        report.provenance((), command),
    ]
    page = report.publish(sections, workdir / "report.html", title="A hybrid and its parents")
    print(f"\nwrote {page}")


def tables(sizes: Scale, results: dict[str, Any]) -> list[Table]:
    """Models as trained, and those of `SIDES` extended."""
    names = recall.band_names(sizes.length, sizes.length * sizes.times)
    trained = {name: [seed["accuracy"] for seed in one["seeds"]] for name, one in results.items()}
    rows, more = [], []
    for name, seeds in trained.items():
        rows.append([name, f"{results[name]['parameters']:,}", *over_seeds(seeds)])
    for name, sides in SIDES.items():
        more.append([name, *over_seeds(trained[name])])
        for side in sides:
            each = [seed["extended"][side] for seed in results[name]["seeds"]]
            for s in factors(sizes):
                more.append([f"{name}, {side}, s={s}", *over_seeds([one[str(s)] for one in each])])
            pairs = zip(trained[name], each, strict=True)
            more.append([f"{name}, {side}, s by band", *over_seeds([as_asked(*x) for x in pairs])])
    return [
        Table(
            "Accuracy by how far into a stream it is asked",
            ["", "parameters", *names, "seeds apart"],
            rows,
        ),
        Table("Accuracy after an extension by s", ["", *names, "seeds apart"], more),
    ]


def as_asked(trained: Sequence[float], by_factor: dict[str, list[float]]) -> list[float]:
    """Accuracy in T as trained, and in each band beyond it of the factor that its end asks for."""
    return [trained[0], *(one[i + 1] for i, one in enumerate(by_factor.values()))]
