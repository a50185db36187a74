"""Figures of runs by matplotlib's Agg canvas; no state is shared between figures.

Colours are those of Okabe and Ito (2008), told apart by readers of any colour vision; line styles
and markers repeat what colours say. Legends stand above the axes, never on the curves.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm.errors import UserError
from lcm.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES = ["-", "--", "-.", ":"]
GREY = "#6b6b6b"
COLUMNS = 3  # of panels
FIRST_SHOWN = 8  # of the positions: the first few cost most and would squeeze all the others


def style(index: int) -> dict[str, Any]:
    """Colour and dashes of the n-th run: all colours first, then again with other dashes."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
    }


def label(name: str) -> str:
    """A run's name as matplotlib shows it literally: no formulas, no hidden underscore names."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def png(figure: "Figure", dpi: int = 150) -> bytes:
    """The figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def panels(rows: int, columns: int, height: float) -> "tuple[Figure, list[Axes]]":
    """An empty figure with light axes: no box, a horizontal grid."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(8.4, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GREY)
        ax.tick_params(color=GREY, labelcolor="#333333")
        ax.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, list(axes)


def new_figure(columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """One row of light axes."""
    return panels(1, columns, 4.6)


def grid(count: int) -> tuple[int, int]:
    """Rows and columns for so many panels."""
    columns = 2 if count == 4 else min(count, COLUMNS)
    return -(-count // columns), columns


def hide(axes: "Sequence[Axes]") -> None:
    """Takes panels that hold nothing out of sight."""
    for ax in axes:
        ax.set_visible(False)


def of_each(
    results: Mapping[str, Any], draw: "Callable[[Axes, Any], None]", xlabel: str, ylabel: str
) -> "Figure":
    """A panel for each result by name, with one legend for all, that of the panel of most lines."""
    rows, columns = grid(len(results))
    figure, axes = panels(rows, columns, height=0.6 + 3.0 * rows)
    for n, (name, result) in enumerate(results.items()):
        draw(axes[n], result)
        axes[n].set_title(label(name), loc="left", fontsize=10, pad=18)
        if n % columns == 0:
            axes[n].set_ylabel(ylabel)
        if n + columns >= len(results):
            axes[n].set_xlabel(xlabel)
    hide(axes[len(results) :])
    deepest = max(range(len(results)), key=lambda n: len(axes[n].lines))
    legend(figure, axes[deepest])
    return figure


def legend(figure: "Figure", ax: "Axes") -> None:
    """One legend above all axes, in as many rows as its names need."""
    handles, labels = ax.get_legend_handles_labels()
    widest = max(map(len, labels), default=1)
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=max(1, min(len(labels), 90 // (widest + 8))),
        frameon=False,
    )


def _log2_axis(ax: "Axes", ticks: Sequence[int], texts: Sequence[str]) -> None:
    """A log2 axis with ticks at these lengths alone."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(ticks), list(texts))
    ax.minorticks_off()


def _band(point: dict[str, Any], key: str) -> float:
    """A confidence limit to draw, nan where there is none."""
    return np.nan if point[key] is None else point[key]


def _train_lengths(runs: Sequence[Run]) -> list[int]:
    return sorted({run.evaluation["settings"]["train_length"] for run in runs})


def _mark_train_lengths(ax: "Axes", runs: Sequence[Run]) -> None:
    """A dashed line at each training length, named above the axes where no curve runs."""
    for length in _train_lengths(runs):
        mark_length(ax, length, f"trained on {length:,}")


def mark_length(ax: "Axes", length: int, text: str) -> None:
    ax.axvline(length, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    ax.annotate(
        text,
        (length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=9,
        color=GREY,
    )


def loss_by_position(runs: Sequence[Run], unit: str) -> "Figure":
    """Loss against position in windows of the longest length, with confidence bands."""
    figure, (ax,) = new_figure()
    longest = max(run.evaluation["lengths"][-1]["length"] for run in runs)
    first = FIRST_SHOWN if longest > 8 * FIRST_SHOWN else 1
    for index, run in enumerate(runs):
        curve = run.evaluation["lengths"][-1]["curve"]
        # positions counted from 1: a bin [a, b) holds the (a+1)-th to the b-th token
        centre = np.array([np.sqrt((a + 1) * b) for a, b in pairwise(curve["edges"])])
        shown = centre >= first
        low, high, value = (np.array(curve[key], float)[shown] for key in ("low", "high", "value"))
        colour = style(index)["color"]
        ax.fill_between(centre[shown], low, high, color=colour, alpha=0.15, linewidth=0)
        ax.plot(centre[shown], value, linewidth=2, label=label(run.name), **style(index))
    _mark_train_lengths(ax, runs)
    ticks = [2**k for k in range(longest.bit_length()) if 2**k >= first]
    _log2_axis(ax, ticks, [f"{tick:,}" for tick in ticks])
    ax.set_xlabel("position in the window (tokens, the first is 1; log scale)")
    ax.set_ylabel(f"loss ({unit})")
    legend(figure, ax)
    return figure


def length_curve(runs: Sequence[Run], unit: str) -> "Figure":
    """Mean loss against window length, with error bars."""
    figure, (ax,) = new_figure()
    texts: dict[int, str] = {}
    for index, run in enumerate(runs):
        points = run.evaluation["lengths"]
        nudge = 2 ** (0.03 * (index - (len(runs) - 1) / 2))  # error bars side by side
        _errorbars(ax, [p["length"] * nudge for p in points], points, index, run.name)
        texts |= {p["length"]: f"{p['length']:,}\n{p['multiple']:g}×" for p in points}
    if len(_train_lengths(runs)) > 1:  # multiples of what differs from run to run
        texts = {length: f"{length:,}" for length in texts}
    _mark_train_lengths(ax, runs)
    _log2_axis(ax, sorted(texts), [texts[length] for length in sorted(texts)])
    ax.set_xlabel("window length (tokens; multiples of the training length; log scale)")
    ax.set_ylabel(f"mean loss ({unit})")
    legend(figure, ax)
    return figure


def context_curve(runs: Sequence[Run], unit: str) -> "Figure":
    """Loss of the same tokens against how much text was read before them."""
    figure, (ax,) = new_figure()
    contexts: set[int] = set()
    for index, run in enumerate(runs):
        points = [p for p in run.evaluation["context"]["points"] if p["context"] > 0]
        nudge = 2 ** (0.03 * (index - (len(runs) - 1) / 2))
        _errorbars(ax, [p["context"] * nudge for p in points], points, index, run.name)
        contexts |= {p["context"] for p in points}
    _mark_train_lengths(ax, runs)
    _log2_axis(ax, sorted(contexts), [f"{context:,}" for context in sorted(contexts)])
    ax.set_xlabel("tokens of context before the scored ones (log scale)")
    ax.set_ylabel(f"mean loss of the same tokens ({unit})")
    legend(figure, ax)
    return figure


def _errorbars(
    ax: "Axes", x: Sequence[float], points: Sequence[dict[str, Any]], index: int, name: str
) -> None:
    """One run's points with confidence limits, joined by a line."""
    loss = [point["loss"] for point in points]
    value = np.array([p["value"] for p in loss])
    errors = [value - [_band(p, "low") for p in loss], [_band(p, "high") for p in loss] - value]
    ax.errorbar(
        x,
        value,
        yerr=errors,
        marker=MARKERS[index % len(MARKERS)],
        markersize=6,
        linewidth=2,
        elinewidth=1.2,
        capsize=3,
        label=label(name),
        **style(index),
    )


def accuracy_curve(curves: Mapping[str, Sequence[dict[str, Any]]], trained_to: int) -> "Figure":
    """Accuracy against the length of a task, a curve each, with confidence limits."""
    figure, (ax,) = new_figure()
    lengths = sorted({point["length"] for points in curves.values() for point in points})
    for index, (name, points) in enumerate(curves.items()):
        nudge = 0.06 * (index - (len(curves) - 1) / 2)  # error bars side by side
        value = np.array([point["value"] for point in points])
        errors = [
            value - [_band(p, "low") for p in points],
            [_band(p, "high") for p in points] - value,
        ]
        ax.errorbar(
            [point["length"] + nudge for point in points],
            value,
            yerr=np.maximum(errors, 0),
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=2,
            elinewidth=1.2,
            capsize=2,
            label=label(name),
            **style(index),
        )
    mark_length(ax, trained_to, f"trained to {trained_to:,}")
    ax.set_xticks(lengths if len(lengths) <= 24 else lengths[:: -(-len(lengths) // 24)])
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlabel("length")
    ax.set_ylabel("exact match")
    legend(figure, ax)
    return figure


def curves_by_position(curves: Mapping[str, np.ndarray], trained_to: int, ylabel: str) -> "Figure":
    """Anything that has a value at every position from 0 on, a curve each."""
    figure, (ax,) = new_figure()
    for index, (name, values) in enumerate(curves.items()):
        ax.plot(np.arange(len(values)), values, linewidth=1.6, label=label(name), **style(index))
    mark_length(ax, trained_to, f"trained to {trained_to:,}")
    ax.set_xlabel("position")
    ax.set_ylabel(ylabel)
    legend(figure, ax)
    return figure


def training_curves(runs: Sequence[Run]) -> "Figure":
    """Training loss, and gradient norm where it was logged, against the step."""
    from matplotlib.ticker import LogLocator

    panels = {"loss": "training loss (nats per token)", "grad_norm": "gradient norm (log scale)"}
    panels = {k: v for k, v in panels.items() if any(k in row for r in runs for row in r.metrics)}
    figure, axes = new_figure(max(1, len(panels)))
    for ax, (key, text) in zip(axes, panels.items(), strict=False):
        for index, run in enumerate(runs):
            rows = [row for row in run.metrics if isinstance(row.get(key), int | float)]
            if not rows:
                continue
            steps, values = [row["step"] for row in rows], np.array([row[key] for row in rows])
            colour = style(index)["color"]
            ax.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
            smooth = moving_average(values, max(1, len(values) // 40))
            ax.plot(steps, smooth, linewidth=2, label=label(run.name), **style(index))
        ax.set_xlabel("step")
        ax.set_ylabel(text)
        if key == "grad_norm":
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
    legend(figure, axes[0])
    return figure


def training_positions(runs: Sequence[Run]) -> "Figure":
    """The last logged training loss by position, in the bins it was logged in."""
    figure, (ax,) = new_figure()
    for index, run in enumerate(runs):
        logged = [row for row in run.metrics if row.get("loss_by_position")]
        if logged:
            values = np.array(logged[-1]["loss_by_position"], float)
            edges = np.linspace(0, 100, len(values) + 1)
            ax.stairs(
                values, edges, baseline=None, linewidth=2, label=label(run.name), **style(index)
            )
    ax.set_xlabel("position in the training row (% of its bins)")
    ax.set_ylabel("training loss (nats per token)")
    legend(figure, ax)
    return figure


def moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value with `width` values on either side; nan values are passed over.

    Near the start, where training curves fall steeply, the window shrinks to stay centred.
    """
    index = np.arange(len(values))
    reach = np.minimum(width, index)
    low, high = index - reach, np.minimum(index + reach + 1, len(values))
    known = np.isfinite(values)
    total = np.append(0.0, np.cumsum(np.where(known, values, 0.0)))
    count = np.append(0, np.cumsum(known))
    total, count = total[high] - total[low], count[high] - count[low]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
