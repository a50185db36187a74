"""A model trained at 64 tokens reads 512: every training-free extension, and five tuned ones.

    lcm reproduce context_extension [--scale cpu|tiny]

Two decoders with RoPE are trained on rows of 64: one on the bytes of Python's library, one on
looking up a symbol in random ones. Each method is a change of their config. Loss cannot rank the
remaps beside a plain window, since so small a language model gains nothing from afar; the lookup
can, since its answer lies anywhere.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lcm import config, evaluation, report, training
from lcm.data import tasks
from lcm.evaluation.exact_match import exact_match
from lcm.report import plots
from lcm.report.tables import Table
from lcm.training.workdir import write_text

SCALES = ("cpu", "tiny")
TRAINED = 64  # tokens, L
FACTORS = (2, 4, 8)  # s
TUNED_TO = 4  # s of the tuned methods

# Untuned methods at s times the trained length, as overrides of `model`.
METHODS: dict[str, Sequence[str]] = {
    "rope": (),
    "linear": ("positions=linear", "positions.factor={s}"),
    "ntk, factor s": ("positions=ntk", "positions.factor={s}"),
    "ntk, factor 2s-1": ("positions=ntk", "positions.factor={t}"),
    "dynamic ntk": ("positions=dynamic_ntk", "positions.factor=2"),
    "yarn": ("positions=yarn", "positions.factor={s}"),
    "yarn, no temperature": (
        "positions=yarn",
        "positions.factor={s}",
        "positions.attention_factor=1.0",
    ),
    "rerope": ("positions=rerope", "positions.window=32"),
    "rerope, log-n": ("positions=log_n+rerope", "positions.second.window=32"),
    "leaky rerope": ("positions=leaky_rerope", "positions.window=32", "positions.k={k}"),
    "self-extend": ("positions=self_extend", "positions.group=16", "positions.window=32"),
    "dual chunk": ("positions=dual_chunk", "positions.chunk=40", "positions.local=24"),
    "lm-infinite": ("positions=lm_infinite", "positions.window=60", "positions.sinks=4"),
    "streaming": ("positions=streaming_llm", "positions.kept=64", "positions.sinks=4"),
    "reattention": (
        "positions=reattention",
        *("positions.sinks=4", "positions.local=28", "positions.chunk=8"),
        *("positions.clip=4", "positions.span=8", "positions.top=2"),
    ),
    "window": ("window=64",),
}

# Overrides of model and training for methods tuned to TUNED_TO L, at an equal budget of tokens.
LONG = ("data.length=256", "train.batch=4")
TUNINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rope, at L": ((), ()),
    "rope, at 4 L": ((), LONG),
    "PI, at 4 L": (METHODS["linear"], LONG),
    "YaRN, at 4 L": ((*METHODS["yarn"], "positions.original=64"), LONG),
    "PoSE, at L": (METHODS["linear"], ("train.placement=pose", "train.placement.factor=4")),
    "CREAM, at L": (METHODS["linear"], ("train.placement=cream", "train.placement.factor=4")),
    # At the rate of the others the equation learns to divide by t, which suits the sparse positions
    # of training and not the dense ones of reading: 2.7 nats at the end of 4 L, not 2.1.
    "CLEX, at L": (
        ("positions=clex", "positions.factor=4"),
        ("train.placement=clex", "train.placement.factor=4", "train.lr=1e-4"),
    ),
}

# Nats per byte of the run that this one repeats: 2 layers, 4 heads, width 96, 2,500 steps of
# 16 x 64 bytes, one seed, noise 0.04; at 256 bytes in ranges, and at 512 in its last quarter.
RANGES = ((32, 64), (64, 96), (96, 128), (128, 192), (192, 256))
LAST = (384, 512)
REFERENCE: dict[str, tuple[float | None, ...]] = {
    "rope": (1.40, 1.56, 2.81, 3.57, 3.70, 4.04),
    "linear": (2.99, 2.89, 2.96, 2.96, 3.01, 3.45),
    "ntk, factor s": (1.44, 1.45, 1.45, 2.34, 3.37, 3.55),
    "ntk, factor 2s-1": (1.47, 1.53, 1.49, 1.74, 3.10, 3.43),
    "yarn": (1.62, 1.62, 1.59, 1.63, 1.59, 1.90),
    "yarn, no temperature": (1.60, 1.64, 1.67, 1.72, 1.76, 2.22),
    "rerope": (1.42, 1.37, 1.42, 1.41, 1.44, 1.50),
    "rerope, log-n": (1.36, 1.38, 1.36, 1.36, 1.37, 1.38),
    "self-extend": (1.41, 1.38, 1.41, 1.36, 1.38, 1.44),
    "dual chunk": (1.32, 1.33, 1.34, 1.33, 1.36, None),
    "lm-infinite": (1.32, 1.31, 1.34, 1.37, 1.35, None),
    "window": (1.34, 1.34, 1.33, 1.34, 1.39, None),
}


class Scale(NamedTuple):
    """Overrides of training and of tuning, and what is scored."""

    training: tuple[str, ...]
    tuning: tuple[str, ...]
    scored: tuple[str, ...]
    answers: int
    methods: tuple[str, ...] = tuple(METHODS)
    tunings: tuple[str, ...] = tuple(TUNINGS)


CPU = Scale(
    training=("train.steps=2500", "train.batch=16", "checkpoint.every=2500"),
    tuning=("train.steps=300", "train.batch=16", "train.lr=1e-3", "train.warmup=20"),
    scored=("eval.tokens=32768", "eval.batch_tokens=8192"),
    answers=200,
)
TINY = Scale(
    training=("train.steps=4", "train.batch=4", "train.warmup=1", "checkpoint.every=4"),
    tuning=("train.steps=2", "train.batch=4", "train.warmup=1", "checkpoint.every=2"),
    scored=("eval.tokens=1024", "eval.batch_tokens=1024"),
    answers=4,
    methods=("rope", "yarn", "self-extend"),
    tunings=("rope, at L", "CREAM, at L", "CLEX, at L"),
)

MODEL = ("model.width=96", "model.depth=2", "model.heads=4", f"data.length={TRAINED}")
LOOKUP = "induction,train={low}-{high},test={next}-520,size=200000"


def run(workdir: pathlib.Path, scale: str) -> None:
    """Trains, tunes and scores what is not there yet; writes `results.json` and the page."""
    sizes = {"cpu": CPU, "tiny": TINY}[scale]
    bases = {}
    for name in ("text", "lookup"):
        cfg = _base(name, sizes)
        step = training.train(cfg, workdir / name, title=f"train {name}").step
        if step < cfg.train.steps:
            return  # stopped by a signal, and said so
        bases[name] = evaluation.load(workdir / name)
    untuned = {name: _scores(bases, sizes, name, workdir) for name in sizes.methods}
    tuned = {name: _tuned(bases, sizes, name, workdir) for name in sizes.tunings}
    result = {"scale": scale, "untuned": untuned, "tuned": tuned}
    write_text(workdir / "results.json", json.dumps(result, indent=1) + "\n")
    command = f"lcm reproduce context_extension --scale {scale} --workdir {workdir}"
    sections = [*_untuned_sections(untuned), *_tuned_sections(tuned)]
    page = report.publish(
        [*sections, report.provenance((), command)],
        workdir / "report.html",
        title="Context extension: trained at 64, read at 512",
    )
    print(_summary(untuned, tuned))
    print(f"\nwrote {page}")


def _base(name: str, sizes: Scale, length: int = TRAINED) -> ConfigDict:
    """The config of the language model or of the lookup, on rows of some length."""
    cfg = config.override(config.base(), [*MODEL, *sizes.training, *sizes.scored])
    cfg.name = name
    return config.override(cfg, _data(name, length))


def _data(name: str, length: int) -> list[str]:
    if name == "text":
        return [f"data.length={length}"]
    spec = "task:" + LOOKUP.format(low=4, high=length - 4, next=length - 3)
    source = [f"data.source={spec}", f"data.tokenizer={spec}", "data.packing=first_fit"]
    return [*source, f"data.length={length}"]


def _overridden(cfg: ConfigDict, overrides: Sequence[str], s: int) -> ConfigDict:
    """The config read at s L by a method."""
    filled = [o.format(s=s, t=2 * s - 1, k=max(1.0, 2.0 * s)) for o in overrides]
    return config.override(cfg, [f"model.{o}" for o in filled])


def _scores(
    bases: dict[str, Any], sizes: Scale, name: str, workdir: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """Loss by position and answers at s L of an untuned method, by s."""
    file = workdir / "untuned" / f"{_safe(name)}.json"
    if not file.exists():
        found = {}
        for s in (1, *FACTORS):
            models_ = {
                kind: base._replace(cfg=_overridden(base.cfg, METHODS[name], s))
                for kind, base in bases.items()
            }
            found[str(s)] = _score(models_, sizes, s, f"{name} at {s} L")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(found) + "\n")
    return json.loads(file.read_text())


def _score(found: dict[str, Any], sizes: Scale, s: int, title: str) -> dict[str, Any]:
    """Mean loss at each position of windows of s L bytes, and exact answers s L tokens long."""
    model = found["text"]
    cfg = config.override(model.cfg, [f"eval.multiples={s}", f"data.length={TRAINED}"])
    loss = evaluation.evaluate_model(model._replace(cfg=cfg), title=title)["lengths"][0]
    lookup = found["lookup"]
    length = s * TRAINED - 4
    task = tasks.make(LOOKUP.format(low=4, high=TRAINED - 4, next=TRAINED - 3))
    answers = exact_match(lookup.cfg, lookup.params, task, [length], sizes.answers)[length]
    return {
        "loss": loss["loss"]["value"],
        "by_position": loss["by_position"]["mean"],
        "answers": {**answers._asdict(), "length": length, "by_seed": [answers.value]},
    }


def _tuned(
    bases: dict[str, Any], sizes: Scale, name: str, workdir: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """Scores by s of a method tuned for TUNED_TO L."""
    folder = workdir / "tuned" / _safe(name)
    file = folder / "scores.json"
    if not file.exists():
        found = {}
        for kind, base in bases.items():
            cfg = _tuning(kind, base.cfg, sizes, name, workdir)
            training.train(cfg, folder / kind, title=f"tune {kind}: {name}")
            params = evaluation.load(folder / kind).params
            read = _overridden(base.cfg, TUNINGS[name][0], TUNED_TO)
            found[kind] = base._replace(cfg=read, params=params)
        scores = {str(s): _score(found, sizes, s, name) for s in (1, *FACTORS)}
        write_text(file, json.dumps(scores) + "\n")
    return json.loads(file.read_text())


def _tuning(
    kind: str, cfg: ConfigDict, sizes: Scale, name: str, workdir: pathlib.Path
) -> ConfigDict:
    """The config of a tuning run: rows of L or 4 L, as many tokens a step."""
    model, how = TUNINGS[name]
    cfg = config.override(cfg, [*sizes.tuning, *how, f"train.init={workdir / kind}"])
    cfg = config.override(cfg, _data(kind, cfg.data.length))
    if kind == "lookup" and cfg.train.placement.name in ("pose", "cream"):
        cfg = config.override(cfg, ["train.placement.text=1"])  # an answer needs its whole text
    cfg.name = f"{kind} {name}"
    cfg.checkpoint.every = cfg.train.steps
    return _overridden(cfg, model, TUNED_TO)


def _ranges(scores: dict[str, dict[str, Any]]) -> list[float]:
    """Mean loss in RANGES of windows of 4 L, and in LAST of those of 8 L."""
    at, far = (np.asarray(scores[str(s)]["by_position"]) for s in (4, 8))
    return [*(float(at[a:b].mean()) for a, b in RANGES), float(far[LAST[0] : LAST[1]].mean())]


def _loss_table(title: str, found: dict[str, Any], reference: bool) -> Table:
    columns = [*(f"256: {a}-{b}" for a, b in RANGES), f"512: {LAST[0]}-{LAST[1]}"]
    rows = []
    for name, scores in found.items():
        beside = REFERENCE.get(name, (None,) * len(columns)) if reference else ()
        cells = [f"{loss:.2f}" for loss in _ranges(scores)]
        pairs = zip(cells, beside, strict=True) if reference else ((cell, None) for cell in cells)
        rows.append([name, *(f"{c} ({b:.2f})" if b is not None else c for c, b in pairs)])
    return Table(title, ["", *columns], rows)


def _curves(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {name: [scores[s]["answers"] for s in scores] for name, scores in found.items()}


def _loss_picture(name: str, found: dict[str, Any], s: int) -> report.Picture:
    lines = {n: scores[str(s)]["by_position"] for n, scores in found.items()}
    smooth = {n: np.convolve(y, np.ones(16) / 16, mode="valid") for n, y in lines.items()}
    last = ", ".join(f"{n} {np.mean(y[-64:]):.2f}" for n, y in lines.items())
    return report.Picture(
        name,
        plots.png(plots.curves_by_position(smooth, TRAINED, "nats per byte")),
        f"Line plot of loss against position in windows of {s * TRAINED}. At the end: {last}.",
        f"Loss by position in windows of {s * TRAINED} bytes, mean over 16 positions. The dashed "
        "line is the trained length.",
    )


def _untuned_sections(found: dict[str, Any]) -> list[report.Section]:
    loss = report.Section(
        "Without training: loss",
        [
            "Mean loss in nats per byte by position, in windows of 256 and 512 bytes, of one model "
            "trained on rows of 64. In brackets the run that this one repeats, noise about 0.04 "
            "there; corpora differ by the Python they come with, so compare differences."
        ],
        [_loss_table("Loss by position, measured (reference run)", found, reference=True)],
        [_loss_picture("untuned-loss", found, 8)],
    )
    text = [
        "One symbol of sixteen follows a mark somewhere in the text, and is asked for at its end: "
        "chance is 0.06. A window or sinks cannot see most of the text."
    ]
    return [loss, report.accuracy("Without training: lookup", _curves(found), TRAINED, text)]


def _tuned_sections(found: dict[str, Any]) -> list[report.Section]:
    loss = report.Section(
        "After tuning for 256: loss",
        ["Each saw as many tokens: 300 steps of 1,024 at the cpu scale, in rows of 64 or of 256."],
        [_loss_table("Loss by position", found, reference=False)],
        [_loss_picture("tuned-loss", found, 4)],
    )
    return [loss, report.accuracy("After tuning for 256: lookup", _curves(found), TRAINED)]


def _summary(untuned: dict[str, Any], tuned: dict[str, Any]) -> str:
    """Loss at the end of 4 L and 8 L, and answers, one line a method."""
    lines = [f"{'':24}{'192-256':>9}{'384-512':>9}  answers at 1, 2, 4, 8 L"]
    for name, scores in {**untuned, **{f"tuned: {n}": x for n, x in tuned.items()}}.items():
        ranges = _ranges(scores)
        answers = "  ".join(f"{scores[s]['answers']['value']:.2f}" for s in scores)
        lines.append(f"{name:24}{ranges[-2]:9.2f}{ranges[-1]:9.2f}  {answers}")
    return "\n".join(lines)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
