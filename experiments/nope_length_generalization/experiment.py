"""Does a decoder need positions to go on? Five encodings on tasks trained short and tested long.

    lcm reproduce nope_length_generalization [--scale cpu|tiny|paper]

Kazemnejad et al., "The Impact of Positional Encoding on Length Generalization in Transformers",
NeurIPS 2023, arXiv:2305.19466, and HeadScale for the model without positions: Wang et al., Findings
of ACL 2024, arXiv:2404.12224. Seeds train side by side; what is finished is not run again.
"""

import json
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lcm import config, positions, report
from lcm.data import tasks
from lcm.evaluation import generalization
from lcm.evaluation.curves import mean_reciprocal_rank
from lcm.training.workdir import write_text

SCALES = ("cpu", "tiny", "paper")

# Name in tables, encoding, its fields. The first five are those of the paper.
ENCODINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("nope", "nope", {}),
    ("t5", "t5", {}),
    ("alibi", "alibi", {}),
    ("rope", "rope", {"fraction": 0.25, "interleaved": True}),
    ("sinusoidal", "sinusoidal", {}),
]
SCALED = "head_scale+nope"  # begins with the parameters of nope; its scales alone are tuned
PUBLISHED_RANK = {"nope": 0.70, "t5": 0.61, "alibi": 0.43, "rope": 0.34, "sinusoidal": 0.21}
RANKED = ("copy", "reverse", "scan", "pcfg")  # tasks that the published ranks are of
SOURCE = "Kazemnejad et al., 2023, arXiv:2305.19466"


class Scale(NamedTuple):
    """How large a run is: specs of tasks, config overrides, seeds, answers per length."""

    tasks: tuple[str, ...]
    overrides: tuple[str, ...]
    seeds: int
    count: int
    encodings: tuple[str, ...] = (*(name for name, *_ in ENCODINGS), SCALED)
    tuning: tuple[str, ...] = ()


# Rows of at most 32 tokens in training, so that all tasks share one compilation per encoding.
CPU = Scale(
    tasks=(
        "copy_rsc,train=2-12,test=13-24,symbols=36",
        "reverse_mc,train=2-8,test=9-16,symbols=10",
        "addition,train=1-4,test=5-8",
        "sort,train=1-4,test=5-8",
        "parity,train=1-7,test=8-14",
    ),
    overrides=(
        *("model.width=64", "model.depth=2", "model.heads=4", "model.vocab=128"),
        *("train.steps=2000", "train.batch=16", "train.lr=1e-3", "train.warmup=100"),
        *(
            "train.weight_decay=0.01",
            "train.z_loss=0",
            "checkpoint.every=1000",
            "checkpoint.keep=1",
        ),
    ),
    seeds=3,
    count=200,
    tuning=("train.steps=200", "train.warmup=20", "train.lr=0.1", "train.weight_decay=0"),
)
TINY = Scale(
    tasks=("copy_rsc,train=2-4,test=5-7,symbols=8", "parity,train=1-3,test=4-5"),
    overrides=(
        *("model.width=16", "model.depth=1", "model.heads=2", "model.vocab=64"),
        *("train.steps=6", "train.batch=2", "train.warmup=2", "train.log_every=2"),
        "checkpoint.every=3",
    ),
    seeds=2,
    count=5,
    encodings=("nope", "rope", SCALED),
    tuning=("train.steps=2", "train.warmup=1"),
)
PAPER = Scale(
    tasks=(
        *("copy_rsc", "copy_rsc2x", "copy_rdc", "copy_cmc", "copy_cmc2x"),
        *("reverse_mc", "reverse_mc2x", "reverse_mcrv", "scan", "pcfg,size=72909"),
        *("addition", "addition,scratchpad=all", "polynomial", "sort", "sort_digits", "sum"),
        *("parity", "parity,scratchpad=all", "lego", "lego_permuted"),
    ),
    overrides=(
        *("model.width=768", "model.depth=12", "model.heads=12", "model.mlp=gelu"),
        *("model.vocab=576", "train.steps=40000", "train.batch=64", "train.lr=3e-5"),
        *("train.schedule=wsd", "train.decay=1.0", "train.final_lr=0", "train.warmup=2400"),
        *("train.weight_decay=0.05", "train.b2=0.999", "train.z_loss=0", "checkpoint.every=2000"),
    ),
    seeds=3,
    count=500,
    tuning=("train.steps=200", "train.warmup=20", "train.lr=0.1", "train.weight_decay=0"),
)


def run(workdir: pathlib.Path, scale: str) -> None:
    """Trains and scores what is not there yet, and writes `results.json` and the page."""
    sizes = {"cpu": CPU, "tiny": TINY, "paper": PAPER}[scale]
    curves: dict[str, dict[str, Any]] = {}
    for spec in sizes.tasks:
        curves[spec] = {name: _points(sizes, spec, name, workdir) for name in sizes.encodings}
    ranks = reciprocal_ranks(curves)
    result = {"scale": scale, "mean_reciprocal_rank": ranks, "tasks": curves}
    write_text(workdir / "results.json", json.dumps(result, indent=1) + "\n")
    command = f"lcm reproduce nope_length_generalization --scale {scale} --workdir {workdir}"
    page = report.publish(
        [*_sections(sizes, curves, ranks), report.provenance((), command)],
        workdir / "report.html",
        title="Length generalisation without positions",
    )
    for name, rank in ranks.items():
        print(f"{name:12} mean reciprocal rank {rank:.2f}, published {PUBLISHED_RANK[name]:.2f}")
    print(f"\nwrote {page}")


def _points(sizes: Scale, spec: str, name: str, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Accuracy by length of one encoding on one task."""
    task, folder = tasks.make(spec), workdir / spec.replace(",", "_") / name
    cfg = _config(sizes, spec, name)
    arguments: dict[str, Any] = {"title": f"{spec.partition(',')[0]} {name}"}
    if name == SCALED:
        before = _config(sizes, spec, "nope")
        arguments["start"] = generalization.trained(before, folder.parent / "nope", sizes.seeds)
    lengths = [n for n in _lengths(task) if generalization.there(task, n, "test")]
    return generalization.study(
        cfg, folder, seeds=sizes.seeds, tested=task, lengths=lengths, count=sizes.count, **arguments
    )


def _lengths(task: tasks.Task) -> list[int]:
    """The longest length trained on, and all that are new."""
    return [task.train[1], *tasks.span(task.test)]


def _config(sizes: Scale, spec: str, name: str) -> ConfigDict:
    """The config of a run; that of HeadScale trains on the lengths that are tested."""
    task = tasks.make(spec)
    cfg = config.override(config.base(), sizes.overrides)
    cfg.name = f"{spec} {name}"
    length = generalization.row_length(task, tasks.span(task.train))
    if name == SCALED:
        low, high = task.train[0], task.test[1]
        spec = _replaced(spec, train=(low, high), test=(high + 1, high + 1))
        length = generalization.row_length(task, _lengths(task))
        begin = positions.uniform_scale(high / task.train[1])
        entry = positions.config(positions.Chain(positions.HeadScale(begin), positions.NoPE()))
        cfg = config.override(cfg, [*sizes.tuning, "train.only=head_scale"])
    else:
        entry = next(positions.config(e, **fields) for n, e, fields in ENCODINGS if n == name)
    cfg.model.positions = ConfigDict(entry)
    cfg.data.update(source=f"task:{spec}", tokenizer=f"task:{spec}", length=length)
    cfg.data.packing = "first_fit"
    return cfg


def _replaced(spec: str, **lengths: tuple[int, int]) -> str:
    """A spec with other lengths."""
    kept = [part for part in spec.split(",") if part.partition("=")[0] not in lengths]
    return ",".join([*kept, *(f"{key}={low}-{high}" for key, (low, high) in lengths.items())])


def reciprocal_ranks(curves: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Mean reciprocal rank of the paper's encodings over tasks and new lengths.

    Over copying, reversing, SCAN and PCFG, as the published one, where a scale has them.
    """
    chosen = [spec for spec in curves if spec.startswith(RANKED)]
    names = [name for name, *_ in ENCODINGS if name in next(iter(curves.values()))]
    scores: dict[str, list[float]] = {name: [] for name in names}
    for spec in chosen:
        first = tasks.make(spec).test[0]
        for name in names:
            scores[name] += [p["value"] for p in curves[spec][name] if p["length"] >= first]
    return mean_reciprocal_rank(scores)


def _sections(
    sizes: Scale, curves: dict[str, dict[str, Any]], ranks: dict[str, float]
) -> list[report.Section]:
    published = [
        report.Published(
            f"mean reciprocal rank of {name} among five, copy, reverse, SCAN and PCFG",
            f"{PUBLISHED_RANK[name]:.2f}",
            f"{rank:.2f}",
            SOURCE,
        )
        for name, rank in ranks.items()
    ]
    text = [
        f"{sizes.seeds} seeds, {sizes.count} answers per length and seed. {SCALED} begins with the"
        " parameters of nope and tunes one factor per head on the lengths that are tested, which"
        " the others never see; it has no part in the ranks."
    ]
    return [
        report.published_beside_measured(published),
        *(
            report.accuracy(spec.replace(",", ", "), by_name, tasks.make(spec).train[1], text)
            for spec, by_name in curves.items()
        ),
    ]
