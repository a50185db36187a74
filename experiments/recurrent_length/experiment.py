"""Recurrent models made to run long: what they begin with in training, and what is done to them.

    lcm reproduce recurrent_length [--scale cpu|tiny]

Overwrite-recall streams, which have no natural length. Models are trained on short pieces from
empty states, then a little more with each start of Ruiz and Gu (2025, arXiv:2507.02782), all of one
budget; what needs no training is done to the first of them (arXiv:2410.07145v1, 2509.19633). All
are scored on streams of 32 times the length.
"""

import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lcm import config, models, report
from lcm.data.streams import OverwriteRecall
from lcm.evaluation import recall
from lcm.evaluation.remembrance import state_norms
from lcm.models import decimation
from lcm.models.decimation import Decimation
from lcm.nn import MIXERS
from lcm.report.tables import Table, number
from lcm.training.carry import KINDS
from lcm.training.seeds import one_seed, train_seeds
from lcm.training.workdir import write_text
from lcm.types import Batch

SCALES = ("cpu", "tiny")
# Measured before at a larger scale: K=32, T=64, 3,000 steps, then 300; one seed.
BEFORE = {
    "from nothing": (0.97, 0.86, 0.68, 0.57, 0.57),
    "zero": (0.97, 0.85, 0.67, 0.57, 0.57),
    "fitted": (0.93, 0.77, 0.57, 0.48, 0.48),
    "passed": (0.96, 0.79, 0.57, 0.50, 0.50),
    "continued": (0.96, 0.90, 0.82, 0.74, 0.75),
}
BEFORE_BANDS = "T", "1-2 T", "2-4 T", "8-16 T", "16-32 T"
STREAMS = 1 << 20  # apart from the seeds of training


class Scale(NamedTuple):
    """How large a run is: pieces of `length` tokens, `streams` of `times` as many to score."""

    mixers: tuple[str, ...]
    keys: int
    length: int
    times: int
    width: int
    heads: int
    state: int
    rows: int
    steps: int
    more: int
    streams: int


# What needs no training, by what it is called: an extension, or a share of the usual norms.
UNTRAINED: dict[str, str | float] = {
    "step 1/2": "step=0.5",
    "step 1/8": "step=0.125",
    "step 1/8, exact": "step=0.125,exact=True",
    "spectrum 0.8": "spectrum=0.8",
    "spectrum 1.25": "spectrum=1.25",
    "retain 0.98": "retain=0.98",
    "insert 0.8": "insert=0.8",
    "window T": "window={0}",
    "window 4 T": "window={1}",
    "norms held": 1.0,
}
DECIMATED = "decimated to T"  # before the second layer


CPU = Scale(("mamba2", "gated_deltanet"), 16, 64, 32, 64, 4, 32, 16, 800, 100, 16)
TINY = Scale(("mamba2",), 4, 8, 4, 16, 2, 4, 4, 4, 2, 4)


def config_of(sizes: Scale, mixer: str, steps: int, *keys: str) -> ConfigDict:
    """A model without MLPs, and a rate of 3e-3 that falls in the last fifth."""
    shape = (
        *("model.depth=2", "model.mlp=none", f"model.pattern={mixer}", "model.expand=2"),
        *(f"model.width={sizes.width}", f"model.heads={sizes.heads}", f"model.state={sizes.state}"),
        *(f"model.vocab={3 * sizes.keys}", f"model.embed_scale={math.sqrt(sizes.width)}"),
        *(f"data.length={sizes.length}", f"train.batch={sizes.rows}", f"train.steps={steps}"),
        *("train.lr=3e-3", "train.schedule=wsd", "train.final_lr=0.17", "train.weight_decay=0"),
        *(f"train.warmup={min(50, steps // 2)}", "train.z_loss=0", f"checkpoint.every={steps}"),
        *("checkpoint.keep=1", "train.log_every=50"),
    )
    return config.override(config.base(), [*shape, *keys])


def begun(sizes: Scale, task: OverwriteRecall, mixer: str, folder: pathlib.Path) -> Any:
    """Parameters trained from empty states, stacked as of one seed."""

    def batch_at(seed: int, step: int) -> Batch:
        return task.batch(task.rows((seed, step), sizes.rows, sizes.length))

    cfg = config_of(sizes, mixer, sizes.steps)
    return train_seeds(cfg, folder / "begun", [0], batch_at, title=f"{mixer}, from nothing")


def gone_on(
    sizes: Scale, task: OverwriteRecall, mixer: str, kind: str, start: Any, folder: pathlib.Path
) -> Any:
    """Parameters after `more` steps with states that begin as `kind` says.

    `zero` is the control. Streams are new ones, in pieces one after another for `continued`.
    """
    streams = task.rows((0, STREAMS), sizes.rows, sizes.more * sizes.length)

    def batch_at(seed: int, step: int) -> Batch:
        if kind == "continued":
            return task.batch(streams[:, step * sizes.length : (step + 1) * sizes.length])
        return task.batch(task.rows((seed, STREAMS, step), sizes.rows, sizes.length))

    keys = "train.lr=5e-4", "train.schedule=constant", "train.warmup=0"
    cfg = config_of(sizes, mixer, sizes.more, *keys, f"train.initial_state={kind}")
    return train_seeds(cfg, folder / kind, [0], batch_at, start=start, title=f"{mixer}, {kind}")


def scored(sizes: Scale, task: OverwriteRecall, mixer: str, params: Any, how: str | float) -> dict:
    """Accuracy by band of the streams, and the mean norm of the last layer's states at the end."""
    cfg = config_of(sizes, mixer, sizes.steps)
    longest = sizes.length * sizes.times
    rows = task.rows((STREAMS,), sizes.streams, longest)
    spans = recall.bands(sizes.length, longest)
    if isinstance(how, float):
        usual = recall.usual_norms(cfg, params, task.batch(rows[:, : sizes.length]))
        most = jax.tree.map(lambda norm: how * norm, usual)
        pairs = recall.answered_within(cfg, params, task.batch(rows), most, sizes.length // 2)
        return {"accuracy": recall.by_band(*pairs, spans)}
    cfg.model.extension = how.format(sizes.length, 4 * sizes.length)
    found = {"accuracy": recall.by_band(*recall.answered(cfg, params, task.batch(rows)), spans)}
    if not how:
        norms = state_norms(cfg, params, rows[:, :longest], sizes.length)
        found["norms"] = [float(each[-1].mean()) for each in norms[0]]
    return found


def decimated(sizes: Scale, task: OverwriteRecall, mixer: str, params: Any) -> dict:
    """Accuracy on the last half of T at the end of each band, which no token of is left out, with
    T others before it in the second layer (DeciMamba, arXiv:2406.14528)."""
    spec, half = models.spec(config_of(sizes, mixer, sizes.steps)), sizes.length // 2
    how = Decimation((1,), base=sizes.length, response=half, least=1)
    longest, found = sizes.length * sizes.times, []
    streams = task.rows((STREAMS,), sizes.streams, longest)
    for _, end in recall.bands(sizes.length, longest):
        batch = task.batch(streams[:, :end])
        read = jax.jit(
            lambda p, batch: decimation.read(spec, p, batch.tokens_BL, batch.context, how)
        )
        answers = np.asarray(read(params, batch)[0][:, -half:].argmax(-1))
        asked = batch.loss_weight_BL[:, -half:] > 0
        right = (answers == batch.targets_BL[:, -half:]) & asked
        found.append(float(right.sum() / asked.sum()))
    return {"accuracy": found}


def possible(mixer: str) -> list[str]:
    """What can be done to a mixer without training."""
    has = MIXERS[mixer].EXTENDS
    asked = lambda how: {item.partition("=")[0] for item in how.split(",")}  # noqa: E731
    names = [name for name, how in UNTRAINED.items() if isinstance(how, float) or asked(how) <= has]
    return [*names, DECIMATED] if hasattr(MIXERS[mixer], "importance") else names


def studied(sizes: Scale, mixer: str, workdir: pathlib.Path) -> dict[str, dict]:
    """Figures of one mixer by what was done to it; what is finished is read."""
    file = workdir / mixer / "scores.json"
    found: dict[str, dict] = json.loads(file.read_text()) if file.exists() else {}
    task = OverwriteRecall(sizes.keys)
    todo = ["from nothing", *KINDS, *possible(mixer)]
    if set(todo) <= set(found):
        return found
    start = begun(sizes, task, mixer, workdir / mixer)
    for name in todo:
        if name in found:
            continue
        params = one_seed(start, 0)
        if name in KINDS:
            params = one_seed(gone_on(sizes, task, mixer, name, start, workdir / mixer), 0)
        if name == DECIMATED:
            found[name] = decimated(sizes, task, mixer, params)
        else:
            found[name] = scored(sizes, task, mixer, params, UNTRAINED.get(name, ""))
        write_text(file, json.dumps(found, indent=1) + "\n")
        print(f"{mixer:16}{name:18}" + "".join(f"{x:7.3f}" for x in found[name]["accuracy"]))
    return found


def run(workdir: pathlib.Path, scale: str) -> None:
    """Trains and scores what is not there yet, and writes `results.json` and the page."""
    sizes = {"cpu": CPU, "tiny": TINY}[scale]
    results = {mixer: studied(sizes, mixer, workdir) for mixer in sizes.mixers}
    write_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
    header = [
        "",
        *recall.band_names(sizes.length, sizes.length * sizes.times),
        "norm at T",
        "norm at the end",
    ]
    tables = [
        Table(f"{mixer}, accuracy by how far into a stream it is asked", header, rows(found))
        for mixer, found in results.items()
    ]
    for table in tables:
        print(f"\n{table.caption}")
        for row in (table.header, *table.rows):
            print(f"{row[0]:18}" + "".join(f"{word:>10}" for word in row[1:]))
    count = models.parameter_count(config_of(sizes, sizes.mixers[0], sizes.steps))
    text = [
        f"{sizes.keys} keys, pieces of {sizes.length} tokens, {sizes.steps} steps from empty "
        f"states, then {sizes.more} more of each kind; {count:,} parameters of {sizes.mixers[0]}. "
        "The control is `zero`. One seed: differences of less than 2 points say nothing."
    ]
    before = Table(
        "Measured before, Mamba-2 with 32 keys, 3,000 steps and 300 more",
        ["", *BEFORE_BANDS],
        [[name, *(number(x, 2) for x in row)] for name, row in BEFORE.items()],
    )
    command = f"lcm reproduce recurrent_length --scale {scale} --workdir {workdir}"
    sections = [
        report.Section("Recall far beyond the length trained on", text, [*tables, before], []),
        report.provenance((), command),
    ]
    page = report.publish(
        sections, workdir / "report.html", title="Recurrent models made to run long"
    )
    print(f"\nwrote {page}")


def rows(found: dict[str, dict]) -> list[list[str]]:
    def norm(one: dict, at: int) -> str:
        return number(one["norms"][at] if "norms" in one else None, 1)

    return [
        [name, *(number(x, 3) for x in one["accuracy"]), norm(one, 0), norm(one, -1)]
        for name, one in found.items()
    ]
