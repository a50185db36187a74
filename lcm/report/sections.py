"""The sections of a report: what of the runs is shown, in words, tables and pictures."""

import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from lcm.report import plots, tables
from lcm.report.runs import Run
from lcm.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIBRARIES = ("lcm", "jax", "jaxlib", "flax", "optax", "grain", "numpy", "matplotlib")


class Picture(NamedTuple):
    """A figure as PNG; `name` is that of the file beside the page, `alt` says what it shows."""

    name: str
    png: bytes
    alt: str
    caption: str


class Section(NamedTuple):
    """A heading with text, tables and pictures under it, in this order; all text is escaped."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


class Published(NamedTuple):
    """A published figure beside the one measured here."""

    quantity: str
    published: str
    measured: str
    source: str


def _plot(
    name: str,
    draw: Callable[[Sequence[Run], str], "Figure"],
    runs: Sequence[Run],
    alt: str,
    caption: str,
) -> Picture:
    return Picture(name, plots.png(draw(runs, tables.loss_unit(runs))), alt, caption)


def evaluation(runs: Sequence[Run]) -> list[Section]:
    """Length curve, loss by position, loss by context and perplexity of the evaluated runs."""
    runs = [run for run in runs if run.evaluation]
    if not runs:
        return []
    contexts = [run for run in runs if run.evaluation["context"]]
    middle = [_context(contexts)] if contexts else []
    return [_lengths(runs), _positions(runs), *middle, _perplexity(runs)]


def _lengths(runs: Sequence[Run]) -> Section:
    table = tables.lengths_table(runs)
    differences = tables.differences_table(runs)
    settings = runs[0].evaluation["settings"]
    ends = "; ".join(
        f"{run.name}: {tables.number(run.evaluation['lengths'][0]['loss']['value'])} to"
        f" {tables.number(run.evaluation['lengths'][-1]['loss']['value'])}"
        for run in runs
    )
    return Section(
        "Loss against length",
        [
            _sample(runs),
            f"± is half the width of the {settings['confidence']:.0%} interval, a percentile"
            f" bootstrap over documents ({settings['replicates']:,} replicates); it spans"
            " how documents differ. Compare runs by their differences on the same documents, whose"
            " intervals are paired. The effective length is the largest length whose loss, like"
            f" that of every shorter one, is below {settings['threshold']:g} times the loss at the"
            " shortest (in brackets: by the upper and by the lower limits of that ratio).",
        ],
        [table, *([differences] if differences else [])],
        [
            _plot(
                "length-curve",
                plots.length_curve,
                runs,
                f"Line plot of mean loss against window length. From the shortest to the longest,"
                f" {ends}. All values are in the table above.",
                "Mean loss of non-overlapping windows of each length over the same tokens."
                " Bars are confidence intervals over documents; runs stand side by side at each"
                " length.",
            )
        ],
    )


def _sample(runs: Sequence[Run]) -> str:
    """How many documents and tokens the length curve rests on."""
    parts = []
    for run in runs:
        documents = run.evaluation["documents"]
        long = documents["long"]
        parts.append(
            (
                f"{len(long['names']):,} of {documents['given']:,} held-out documents"
                f" ({sum(long['tokens']):,} tokens; {documents['long enough']:,} are as long as the"
                " longest window)",
                run.name,
            )
        )
    if len({text for text, _ in parts}) == 1:
        return f"Every run was scored on {parts[0][0]}."
    return "Scored on " + "; ".join(f"{text} for {name}" for text, name in parts) + "."


def _positions(runs: Sequence[Run]) -> Section:
    ends = "; ".join(
        f"{run.name} ends at {tables.number(run.evaluation['lengths'][-1]['curve']['value'][-1])}"
        for run in runs
    )
    beyond = tables.beyond_table(runs)
    return Section(
        "Loss by position",
        [
            "Excess is the loss beyond the training length minus the loss of the very same tokens"
            " in windows of the training length: above 0, reading further costs; below 0, the"
            " longer context helps."
        ]
        if len(beyond.header) > 1
        else [],
        [beyond] if len(beyond.header) > 1 else [],
        [
            _plot(
                "loss-by-position",
                plots.loss_by_position,
                runs,
                f"Line plot of loss against position in the longest window, the training length"
                f" marked. {ends}.",
                "Loss at each position of the longest windows. Neighbouring positions are averaged"
                " in bins that grow by 15 %; the first few positions, which cost most, are left"
                " out. Bands are confidence intervals over documents; the dashed line is the"
                " training length.",
            )
        ],
    )


def _context(runs: Sequence[Run]) -> Section:
    suffix = runs[0].evaluation["context"]["suffix"]
    return Section(
        "Loss by available context",
        pictures=[
            _plot(
                "loss-by-context",
                plots.context_curve,
                runs,
                "Line plot of the loss of the same tokens against the tokens of context before"
                " them.",
                f"The last {suffix} tokens of every span of the longest length, read after more and"
                " more of the text before them. The scored tokens are the same at every point, so a"
                " fall is context being used.",
            )
        ],
    )


def _perplexity(runs: Sequence[Run]) -> Section:
    protocols = runs[0].evaluation["protocols"]
    return Section(
        "Perplexity",
        [
            f"Non-overlapping: {protocols['non-overlapping']}. Sliding: {protocols['sliding']}."
            f" {protocols['tokens']}."
        ],
        [tables.perplexity_table(runs)],
    )


def training(runs: Sequence[Run]) -> list[Section]:
    """Curves and last values of the runs that logged a loss."""
    runs = [run for run in runs if any("loss" in row for row in run.metrics)]
    if not runs:
        return []
    ends = "; ".join(
        f"{run.name}: {tables.number(_last(run, 'loss'))} at step {run.metrics[-1]['step']:,}"
        for run in runs
    )
    alt = f"Line plot of training loss against step. Last values, {ends}."
    caption = (
        "Faint: every logged value. Bold: moving average over one twentieth of the logged steps."
    )
    pictures = [Picture("training", plots.png(plots.training_curves(runs)), alt, caption)]
    if any(row.get("loss_by_position") for run in runs for row in run.metrics):
        pictures.append(
            Picture(
                "training-positions",
                plots.png(plots.training_positions(runs)),
                "Step plot of the last logged training loss by position.",
                "Training loss by position as it was last logged, in the bins of the log.",
            )
        )
    return [Section("Training", [], [tables.training_table(runs)], pictures)]


def _last(run: Run, key: str) -> float | None:
    return next((row[key] for row in reversed(run.metrics) if key in row), None)


def configuration(runs: Sequence[Run]) -> Section:
    """The keys in which the configs differ."""
    table = tables.config_table(runs)
    if table:
        return Section("Configuration", [], [table])
    same = "The runs do not differ in their configs." if len(runs) > 1 else "There is one run."
    return Section("Configuration", [same])


def published_beside_measured(published: Sequence[Published]) -> Section:
    """One table of published figures, what was measured here, and the sources."""
    table = Table(
        "Published figures beside those measured here",
        ["quantity", "published", "measured", "source"],
        [list(entry) for entry in published],
        prose=True,
    )
    return Section("Published and measured", [], [table])


def provenance(runs: Sequence[Run], command: str | None) -> Section:
    """Where everything came from: folders, notes on what could not be read, versions, command."""
    where = [[run.name, str(run.path), "; ".join(run.notes) or "none"] for run in runs]
    versions = [["python", platform.python_version()]]
    for library in LIBRARIES:
        try:
            versions.append([library, metadata.version(library)])
        except metadata.PackageNotFoundError:
            continue
    return Section(
        "How this page was made",
        [f"Command: {command}"] if command else [],
        [
            *([Table("Workdirs", ["run", "folder", "notes"], where, prose=True)] if where else []),
            Table("Versions", ["package", "version"], versions, prose=True),
        ],
    )
