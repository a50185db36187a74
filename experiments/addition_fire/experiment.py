"""Addition of numbers longer than any in training: FIRE, randomised positions, index hints.

    lcm reproduce addition_fire [--scale cpu|tiny|paper]

Zhou et al., "Transformers Can Achieve Length Generalization But Not Robustly", 2024,
arXiv:2402.09371: digits reversed, with and without hints. The spread over seeds is the result.
"""

import json
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lcm import config, positions, report
from lcm.data import tasks
from lcm.evaluation import generalization
from lcm.training.workdir import write_text

SCALES = ("cpu", "tiny", "paper")
SOURCE = "Zhou et al., 2024, arXiv:2402.09371"
VARIANTS = {"hints": "true", "no hints": "false"}


class Scale(NamedTuple):
    """How large a run is. `span` is the range of randomised positions, as the text leaves it out:
    twice the tokens of the longest test example or more."""

    spec: str
    overrides: tuple[str, ...]
    seeds: int
    count: int
    span: int
    lengths: tuple[int, ...]


CPU = Scale(
    spec="addition_hinted,train=1-4,test=5-8,size=200000",
    overrides=(
        *("model.width=64", "model.depth=2", "model.heads=4", "model.vocab=128"),
        *("train.steps=4000", "train.batch=32", "train.lr=2e-3", "train.warmup=100"),
        *("train.z_loss=0", "checkpoint.every=1000", "checkpoint.keep=1"),
    ),
    seeds=5,
    count=200,
    span=128,
    lengths=(2, 3, 4, 5, 6, 7, 8),
)
TINY = Scale(
    spec="addition_hinted,train=1-2,test=3-4",
    overrides=(
        *("model.width=16", "model.depth=1", "model.heads=2", "model.vocab=128"),
        *("train.steps=6", "train.batch=2", "train.warmup=2", "train.log_every=2"),
        "checkpoint.every=3",
    ),
    seeds=2,
    count=5,
    span=64,
    lengths=(2, 3, 4),
)
PAPER = Scale(
    spec="addition_hinted,train=1-40,test=41-100,size=30000000",
    overrides=(
        *("model.width=512", "model.depth=6", "model.heads=8", "model.hidden=2048"),
        *("model.vocab=128", "train.steps=50000", "train.batch=128", "train.lr=3e-4"),
        *("train.warmup=500", "train.final_lr=0.1", "train.z_loss=0", "checkpoint.every=2000"),
    ),
    seeds=10,
    count=1000,
    span=1280,
    lengths=(10, 20, 30, 40, 50, 60, 70, 80, 90, 100),
)


def run(workdir: pathlib.Path, scale: str) -> None:
    """Trains and scores what is not there yet, and writes `results.json` and the page."""
    sizes = {"cpu": CPU, "tiny": TINY, "paper": PAPER}[scale]
    curves = {name: _points(sizes, name, workdir) for name in VARIANTS}
    trained_to = tasks.make(sizes.spec).train[1]
    best = {name: best_seed(points, trained_to) for name, points in curves.items()}
    result = {"scale": scale, "spec": sizes.spec, "curves": curves, "best_seed": best}
    write_text(workdir / "results.json", json.dumps(result, indent=1) + "\n")
    command = f"lcm reproduce addition_fire --scale {scale} --workdir {workdir}"
    page = report.publish(
        [*_sections(sizes, curves, best, trained_to), report.provenance((), command)],
        workdir / "report.html",
        title="Addition past the digits trained on, and how much seeds differ",
    )
    for name, points in curves.items():
        for point in points:
            seeds = " ".join(f"{value:.2f}" for value in sorted(point["by_seed"]))
            print(f"{name:9} {point['length']:4} digits: {point['value']:.2f}   by seed {seeds}")
    print(f"\nwrote {page}")


def _points(sizes: Scale, name: str, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Accuracy by number of digits, with hints or without."""
    spec = f"{sizes.spec},hints={VARIANTS[name]}"
    cfg = _config(sizes, spec)
    task = tasks.make(spec)
    placement = positions.make_placement(cfg.train.placement)  # random in the test too
    return generalization.study(
        cfg,
        workdir / name.replace(" ", "_"),
        seeds=sizes.seeds,
        tested=task,
        lengths=sizes.lengths,
        count=sizes.count,
        placement=placement,
        title=f"addition, {name}",
    )


def _config(sizes: Scale, spec: str) -> ConfigDict:
    task = tasks.make(spec)
    cfg = config.override(config.base(), sizes.overrides)
    cfg.name = spec
    cfg.model.positions = ConfigDict(positions.config("fire", shared=True))
    cfg.train.placement = ConfigDict(positions.placement_config("randomised", range=sizes.span))
    length = generalization.row_length(task, tasks.span(task.train))
    cfg.data.update(source=f"task:{spec}", tokenizer=f"task:{spec}", length=length)
    cfg.data.packing = "first_fit"
    return cfg


def best_seed(points: list[dict[str, Any]], trained_to: int) -> int:
    """The seed with the highest accuracy over the new lengths."""
    new = [point["by_seed"] for point in points if point["length"] > trained_to]
    means = [sum(column) / len(new) for column in zip(*new, strict=True)]
    return max(range(len(means)), key=means.__getitem__)


def _sections(
    sizes: Scale, curves: dict[str, Any], best: dict[str, int], trained_to: int
) -> list[report.Section]:
    ratio = 1.25
    at = min(sizes.lengths, key=lambda n: abs(n - ratio * trained_to))
    by_seed = next(p["by_seed"] for p in curves["hints"] if p["length"] == at)
    published = [
        report.Published(
            f"exact match past training, best and worst seed (here {at} digits, from {trained_to})",
            "25M parameters trained to 40 digits: seeds of equal training loss from about 0 to"
            " over 0.98 at 100 digits",
            f"{max(by_seed):.2f} and {min(by_seed):.2f} of {sizes.seeds}",
            SOURCE,
        )
    ]
    text = [
        "Digits reversed, N + 1 digits in the answer, FIRE with one network for all layers,"
        f" positions drawn from 0 ... {sizes.span - 1} in training and in the test. The best seed"
        f" is {best['hints']} with hints and {best['no hints']} without."
    ]
    return [
        report.published_beside_measured(published),
        report.accuracy("Addition by digits", curves, trained_to, text),
        _each_seed(curves, trained_to),
    ]


def _each_seed(curves: dict[str, Any], trained_to: int) -> report.Section:
    """A picture of every seed's curve for each variant."""
    sections = []
    for name, points in curves.items():
        seeds = range(len(points[0]["by_seed"]))
        single = {
            f"{name}, seed {s}": [
                {"length": p["length"], "value": p["by_seed"][s], "low": None, "high": None}
                for p in points
            ]
            for s in seeds
        }
        sections.append(report.accuracy_picture(f"seeds {name}", single, trained_to))
    return report.Section("Seed by seed", [], [], sections)
