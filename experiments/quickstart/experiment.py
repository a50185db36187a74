"""Train short, read long: three byte-level decoders that differ in their position encoding alone.

    lcm reproduce quickstart

Each is trained at 256 bytes of the running Python's standard library and read at 256 to 2,048.
"""

import pathlib

from lcm import config, evaluation, report, training

ENCODINGS = ("rope", "nope", "alibi")
SCALES = ("cpu", "tiny")
CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py"


def run(workdir: pathlib.Path, scale: str) -> None:
    """Trains, evaluates and reports; run again after an interruption it goes on where it was."""
    folders = [workdir / name for name in ENCODINGS]
    for name, folder in zip(ENCODINGS, folders, strict=True):
        cfg = config.load(f"{CONFIG}:{name},tiny" if scale == "tiny" else f"{CONFIG}:{name}")
        step = training.train(cfg, folder, title=f"train {name:5}").step
        if step < cfg.train.steps:
            return  # stopped by a signal, and said so
        if not (folder / "eval" / f"step-{step}.json").exists():
            evaluation.evaluate_run(folder)
    runs = report.read_all(folders)
    page = report.write(
        folders,
        workdir / "report.html",
        title="Quickstart: train at 256 bytes, read at 2,048",
        published=[_published(runs)] if scale == "cpu" else [],
        command=f"lcm reproduce quickstart --workdir {workdir}",
    )
    print(report.summary(runs))
    print(f"\nwrote {page}")


def _published(runs: list) -> report.Published:
    """ALiBi's headline figure beside the perplexities here; corpora and sizes differ."""
    curves = [(run.name, run.evaluation["lengths"]) for run in runs]
    perplexities = [
        (name, points[0]["perplexity"]["value"], points[-1]["perplexity"]["value"])
        for name, points in curves
    ]
    ends = ", ".join(f"{name} {at:.2f} to {past:.2f}" for name, at, past in perplexities)
    return report.Published(
        quantity="perplexity when read past the training length",
        published="ALiBi trained at 512 tokens of WikiText-103: 18.40 at 3,072",
        measured=f"per byte, from 256 to 2,048: {ends}",
        source="Press et al., 2022, arXiv:2108.12409",
    )
