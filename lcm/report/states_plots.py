"""Figures of recurrent states: effective remembrance, and norms by position."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def remembrance(results: Mapping[str, dict[str, Any]]) -> "Figure":
    """EffRem of the longer length against the tokens left out, a line for each run."""
    figure, (ax,) = plots.new_figure()
    for n, (name, result) in enumerate(results.items()):
        entry = result["remembrance"][-1]
        ax.plot(
            entry["starts"],
            values(entry["distance"]),
            linewidth=2,
            label=plots.label(name),
            **plots.style(n),
        )
    settings = [result["settings"] for result in results.values()]
    for length, trained in sorted({(each["length"], each["train_length"]) for each in settings}):
        if length > trained:
            plots.mark_length(ax, length - trained, f"{trained:,} are left")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    ax.set_xlabel("first tokens left out")
    ax.set_ylabel("effective remembrance (total variation)")
    plots.legend(figure, ax)
    return figure


def norms(results: Mapping[str, dict[str, Any]]) -> "Figure":
    """Mean norms of each layer's arrays by position, a panel for each run."""
    return plots.of_each(results, _norms, "tokens read (log scale)", "norm of states")


def _norms(ax: "Axes", result: dict[str, Any]) -> None:
    """A line for each array: colours are layers, dark at the bottom of the model; dashes arrays."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogFormatter

    found = result["norms"]
    layers = sorted({line["layer"] for line in found["layers"]})
    arrays = sorted({line["array"] for line in found["layers"]})
    shades = colormaps["viridis"](np.linspace(0, 0.88, len(layers)))
    for line in found["layers"]:
        ax.plot(
            found["positions"],
            values(line["mean"]),
            linewidth=1.8,
            color=shades[layers.index(line["layer"])],
            linestyle=plots.DASHES[arrays.index(line["array"]) % len(plots.DASHES)],
            label=named(line),
        )
    plots.mark_length(ax, result["settings"]["train_length"], "trained")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(LogFormatter())
    ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def values(found: Sequence[float | str | None]) -> np.ndarray:
    """Figures as JSON has them: null is no number, "inf" an infinite one."""
    return np.array(found, float)


def named(line: dict[str, Any]) -> str:
    """The layer, counted from 1, and its array's name where it has several."""
    return f"layer {line['layer'] + 1}" + (f", {line['array']}" if line["array"] else "")
