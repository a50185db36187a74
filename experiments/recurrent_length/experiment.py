"""Recurrent models made to run long: what they begin with in training, and what is done to them.

    lcm reproduce recurrent_length [--scale cpu|tiny]

Overwrite-recall streams, which have no natural length. Models are trained on short pieces from
empty states, then a little more with each start of Ruiz and Gu (2025, arXiv:2507.02782), all of one
budget; what needs no training is done to the first of them (arXiv:2410.07145v1, 2509.19633). All
are scored on streams of 32 times the length.
"""

import json
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lcm import config, models, report
from lcm.data.streams import OverwriteRecall
from lcm.evaluation import recall
from lcm.evaluation.remembrance import state_norms
from lcm.models import decimation, distance
from lcm.models.decimation import Decimation
from lcm.nn import MIXERS
from lcm.report.tables import MISSING, Table, captioned, number
from lcm.training.carry import KINDS
from lcm.training.seeds import one_seed, train_seeds
from lcm.training.workdir import write_text
from lcm.types import Batch

SCALES = ("cpu", "tiny")
STREAMS = 1 << 20  # apart from the seeds of training
Found = dict[str, list[dict[str, list[float]]]]  # figures of each seed by what was done


class Study(NamedTuple):
    """A mixer, how many seeds of it, and the pairs within which questions are (0: all the past).

    It is in both layers, or in the second behind a convolution of four tokens (`led`), which brings
    a key to its value where a mixer has no convolution of its own.
    """

    mixer: str
    seeds: int = 1
    window: int = 0
    led: bool = False

    @property
    def pattern(self) -> str:
        return f"gated_conv,{self.mixer}" if self.led else self.mixer

    @property
    def name(self) -> str:
        led = "conv, " if self.led else ""
        return f"{led}{self.mixer}" + (f", last {self.window} pairs" if self.window else "")

    @property
    def folder(self) -> str:
        return self.name.replace(", ", "_").replace(" ", "_")


class Scale(NamedTuple):
    """How large a run is: pieces of `length` tokens, `streams` of `times` as many to score.

    Of `bare` it is only seen how far they come from empty states.
    """

    studies: tuple[Study, ...]
    bare: tuple[Study, ...]
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
# Clocks of the quarter of the heads that read furthest.
FURTHEST: dict[str, float] = {"step 1/2, furthest": 0.5, "step 1/8, furthest": 0.125}


# Those that have a convolution, or a shift of tokens, and those that have not.
CONVOLVED = (
    *("gated_deltanet", "deltanet", "rwkv7", "kda", "rwkv6", "rwkv4", "slstm", "mamba1", "rglru"),
)
OTHERS = (
    *("mamba3", "mlstm", "gla", "retnet", "linear_attention"),
    *("lru", "s4d", "s5", "lstm", "min_gru", "min_lstm"),
)
WINDOW = 12
MAMBA2, LED = Study("mamba2", seeds=3), tuple(Study(name, led=True) for name in OTHERS)
WINDOWED = tuple(
    study._replace(window=WINDOW)
    for study in (MAMBA2, Study("gated_deltanet"), Study("gla", led=True))
)
STUDIES = MAMBA2, *map(Study, CONVOLVED), *LED, *WINDOWED
CPU = Scale(STUDIES, tuple(map(Study, OTHERS)), 16, 32, 32, 64, 4, 32, 16, 1400, 500, 16)
TINY = Scale((Study("mamba2", 2),), (Study("gla", led=True),), 4, 8, 4, 16, 2, 4, 4, 4, 2, 4)


def config_of(sizes: Scale, study: Study, steps: int, *keys: str) -> ConfigDict:
    """A model without MLPs, and a rate of 3e-3 that falls in the last fifth."""
    shape = recall.training(
        sizes.width, sizes.heads, 3 * sizes.keys, sizes.length, sizes.rows, steps
    )
    layers = (
        *("model.mlp=none", f"model.pattern={study.pattern}", "model.expand=2"),
        f"model.state={sizes.state}",
    )
    return config.override(config.base(), [*shape, *layers, *keys])


def begun(sizes: Scale, study: Study, folder: pathlib.Path) -> Any:
    """Parameters trained from empty states, stacked by seed."""
    task = OverwriteRecall(sizes.keys, study.window)

    def batch_at(seed: int, step: int) -> Batch:
        return task.batch(task.rows((seed, step), sizes.rows, sizes.length))

    cfg, seeds = config_of(sizes, study, sizes.steps), range(study.seeds)
    return train_seeds(cfg, folder / "begun", seeds, batch_at, title=f"{study.name}, from nothing")


def gone_on(sizes: Scale, study: Study, kind: str, start: Any, folder: pathlib.Path) -> Any:
    """Parameters after `more` steps with states that begin as `kind` says.

    `zero` is the control. Streams are new ones, in pieces one after another for `continued`.
    """
    task, seeds = OverwriteRecall(sizes.keys, study.window), range(study.seeds)
    whole = sizes.more * sizes.length
    streams = [task.rows((seed, STREAMS), sizes.rows, whole) for seed in seeds]

    def batch_at(seed: int, step: int) -> Batch:
        if kind == "continued":
            piece = slice(step * sizes.length, (step + 1) * sizes.length)
            return task.batch(streams[seed][:, piece])
        return task.batch(task.rows((seed, STREAMS, step), sizes.rows, sizes.length))

    keys = "train.lr=5e-4", "train.schedule=constant", "train.warmup=0"
    cfg = config_of(sizes, study, sizes.more, *keys, f"train.initial_state={kind}")
    title = f"{study.name}, {kind}"
    return train_seeds(cfg, folder / kind, seeds, batch_at, start=start, title=title)


def scored(sizes: Scale, study: Study, params: Any, how: str | float) -> dict[str, list[float]]:
    """Accuracy of one seed by band, and the mean norm of the last layer's states at the ends."""
    cfg, task = (
        config_of(sizes, study, sizes.steps),
        OverwriteRecall(sizes.keys, study.window),
    )
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
        norms = state_norms(cfg, params, rows, sizes.length)[0]
        found["norms"] = [float(norms[at][-1].mean()) for at in (0, -1)]
    return found


def slowed(sizes: Scale, study: Study, params: Any, step: float) -> dict[str, list[float]]:
    """Accuracy with slower clocks in the heads that read furthest, as UPI has it, by the mean
    distances of hidden attention in other streams of four lengths."""
    cfg, task = (
        config_of(sizes, study, sizes.steps, "model.options=clocked=True"),
        OverwriteRecall(sizes.keys, study.window),
    )
    spec, longest = models.spec(cfg), sizes.length * sizes.times
    params = models.adopt(cfg, params, jax.random.key(0))
    others = task.rows((STREAMS, 1), sizes.streams, min(4 * sizes.length, longest))
    far = distance.mean_distances(spec, params, others)
    batch = task.batch(task.rows((STREAMS,), sizes.streams, longest))
    pairs = recall.answered(cfg, distance.slowed(spec, params, far, step, 0.25), batch)
    return {"accuracy": recall.by_band(*pairs, recall.bands(sizes.length, longest))}


def decimated(sizes: Scale, study: Study, params: Any) -> dict[str, list[float]]:
    """Accuracy on the last half of T at the end of each band, which no token of is left out, with
    T others before it in the second layer (DeciMamba, arXiv:2406.14528)."""
    spec, half = models.spec(config_of(sizes, study, sizes.steps)), sizes.length // 2
    how, task = (
        Decimation((1,), sizes.length, half, least=1),
        OverwriteRecall(sizes.keys, study.window),
    )
    longest, found = sizes.length * sizes.times, []
    streams = task.rows((STREAMS,), sizes.streams, longest)
    for _, end in recall.bands(sizes.length, longest):
        batch = task.batch(streams[:, :end])
        answers = np.asarray(_decimated(spec, how, params, batch)[:, -half:])
        asked = batch.loss_weight_BL[:, -half:] > 0
        right = (answers == batch.targets_BL[:, -half:]) & asked
        found.append(float(right.sum() / asked.sum()))
    return {"accuracy": found}


@partial(jax.jit, static_argnums=(0, 1))
def _decimated(spec: models.ModelSpec, how: Decimation, params: Any, batch: Batch) -> Any:
    return decimation.read(spec, params, batch.tokens_BL, batch.context, how)[0].argmax(-1)


def possible(study: Study) -> list[str]:
    """What can be done to a mixer without training; of questions in a window it is left out."""
    if study.window:
        return []
    has = MIXERS[study.mixer].EXTENDS
    asked = lambda how: {item.partition("=")[0] for item in how.split(",")}  # noqa: E731
    names = [name for name, how in UNTRAINED.items() if isinstance(how, float) or asked(how) <= has]
    mixer = MIXERS[study.mixer]
    names += FURTHEST if hasattr(mixer, "hidden_attention") else []
    return [*names, DECIMATED] if hasattr(mixer, "importance") else names


def studied(sizes: Scale, study: Study, todo: Sequence[str], workdir: pathlib.Path) -> Found:
    """Figures of each seed by what is done to the model; what is finished is read."""
    folder = workdir / study.folder
    file = folder / "scores.json"
    found: Found = json.loads(file.read_text()) if file.exists() else {}
    if set(todo) <= set(found):
        return found
    start = begun(sizes, study, folder)
    for name in todo:
        if name in found:
            continue
        stacked = gone_on(sizes, study, name, start, folder) if name in KINDS else start
        found[name] = []
        for seed in range(study.seeds):
            params = one_seed(stacked, seed)
            if name == DECIMATED:
                found[name].append(decimated(sizes, study, params))
            elif name in FURTHEST:
                found[name].append(slowed(sizes, study, params, FURTHEST[name]))
            else:
                found[name].append(scored(sizes, study, params, UNTRAINED.get(name, "")))
        write_text(file, json.dumps(found, indent=1) + "\n")
        shown = mean(found[name], "accuracy")
        print(f"{study.name:32}{name:18}" + "".join(f"{x:7.3f}" for x in shown), flush=True)
    jax.clear_caches()  # programs of five studies had 36,500 of the 65,530 maps Linux gives
    return found


def run(workdir: pathlib.Path, scale: str) -> None:
    """Trains and scores what is not there yet, and writes `results.json` and the page."""
    sizes = {"cpu": CPU, "tiny": TINY}[scale]
    results: dict[str, Found] = {}
    # All mixers from empty states, then all that is done to each.
    parts = (
        ((*sizes.studies, *sizes.bare), lambda _: ["from nothing"]),
        (sizes.studies, lambda study: [*possible(study), *KINDS]),
    )
    for studies, part in parts:
        for study in studies:
            results[study.name] = studied(sizes, study, part(study), workdir)
            write_text(workdir / "results.json", json.dumps(results, indent=1) + "\n")
            shown = tables(sizes, results)
            write_text(workdir / "tables.md", captioned(shown))
    every = *sizes.studies, *sizes.bare
    counts = [models.parameter_count(config_of(sizes, study, 1)) for study in every]
    text = [
        f"{sizes.keys} keys, pieces of {sizes.length} tokens, {sizes.steps} steps from empty "
        f"states, then {sizes.more} more of each kind; {min(counts):,} to {max(counts):,} "
        "parameters. The control is `zero`. Means of seeds where there are several; of one, "
        "differences of less than 2 points say nothing."
    ]
    command = f"lcm reproduce recurrent_length --scale {scale} --workdir {workdir}"
    sections = [
        report.Section("Recall far beyond the length trained on", text, shown, []),
        report.provenance((), command),
    ]
    page = report.publish(
        sections, workdir / "report.html", title="Recurrent models made to run long"
    )
    print(f"\nwrote {page}")


def mean(seeds: list[dict], what: str) -> list[float]:
    """The mean over seeds of each figure."""
    return [float(x) for x in np.mean([one[what] for one in seeds], axis=0)]


def tables(sizes: Scale, results: dict[str, Found]) -> list[Table]:
    """Studies by rows, as far as they are done: as trained, after each start of more training, and
    with what needs none; then each of them whole."""
    names = recall.band_names(sizes.length, sizes.length * sizes.times)
    there, bare = (
        [study for study in studies if study.name in results]
        for studies in (sizes.studies, sizes.bare)
    )
    more, at = ["from nothing", *KINDS], names[-1]
    untrained = ["from nothing", *UNTRAINED, *FURTHEST, DECIMATED]
    return [
        Table(
            "From empty states: accuracy by how far into a stream it is asked",
            ["", "parameters", "seeds", *names, "seeds apart", "norm, T", "norm, end"],
            [as_trained(sizes, s, results[s.name]["from nothing"]) for s in (*there, *bare)],
        ),
        Table(
            f"Accuracy at {at} after more training",
            ["", *more],
            [at_the_end(study, results[study.name], more) for study in there],
        ),
        Table(
            f"Accuracy at {at} without more training",
            ["", *untrained],
            [at_the_end(s, results[s.name], untrained) for s in there if not s.window],
        ),
        *(whole(names, *one) for one in results.items()),
    ]


def as_trained(sizes: Scale, study: Study, seeds: list[dict]) -> list[str]:
    """A line: means of seeds, how far apart they are in the last band, and norms of states."""
    ends = [one["accuracy"][-1] for one in seeds]
    apart = number(max(ends) - min(ends), 3) if len(seeds) > 1 else MISSING
    count = models.parameter_count(config_of(sizes, study, 1))
    figures = [number(x, 3) for x in mean(seeds, "accuracy")]
    norms = [number(x, 1) for x in mean(seeds, "norms")]
    return [study.name, f"{count:,}", str(len(seeds)), *figures, apart, *norms]


def at_the_end(study: Study, found: Found, names: Sequence[str]) -> list[str]:
    """A line of the last band; what a mixer does not take is refused, a dash is not yet run."""
    takes = {"from nothing", *KINDS, *possible(study)}

    def one(name: str) -> str:
        value = mean(found[name], "accuracy")[-1] if name in found else None
        return number(value, 3) if name in takes else "refused"

    return [study.name, *map(one, names)]


def whole(names: Sequence[str], study: str, found: Found) -> Table:
    """All of one study."""
    rows = []
    for name, seeds in found.items():
        norms = mean(seeds, "norms") if "norms" in seeds[0] else (None, None)
        figures = [number(x, 3) for x in mean(seeds, "accuracy")]
        rows.append([name, *figures, *(number(x, 1) for x in norms)])
    return Table(study, ["", *names, "norm, T", "norm, end"], rows)
