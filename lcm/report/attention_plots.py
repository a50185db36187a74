"""Figures of attention: entropy by position, and the scores of heads, a panel for each run."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm.evaluation.bins import geometric_edges
from lcm.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Results = Mapping[str, dict[str, Any]]  # what `lcm analyse` wrote, by name
GROWTH = 1.12  # of the bins that positions are averaged in
NUMBERED = 64  # cells of a heat map with a figure in each, at the most


def entropy_by_position(results: Results) -> "Figure":
    """Mean entropy of each layer at each position of the longer rows, below ln(i + 1)."""
    return plots.of_each(
        results, _entropy, "position (the first is 1; log scale)", "entropy of attention (nats)"
    )


def _entropy(ax: "Axes", result: dict[str, Any]) -> None:
    """A line for each layer, dark at the bottom of the model, means in bins of position."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullLocator

    values, trained = (
        np.array(result["statistics"][-1]["entropy"]),
        result["settings"]["train_length"],
    )
    edges = geometric_edges(values.shape[1], GROWTH, through=(trained,))
    counts = np.diff(edges)
    centre = np.sqrt((edges[:-1] + 1) * edges[1:])  # of positions counted from 1
    binned = np.add.reduceat(values, edges[:-1], axis=1) / counts
    bound = np.add.reduceat(np.log(np.arange(1, values.shape[1] + 1)), edges[:-1]) / counts
    ax.plot(
        centre, bound, color=plots.GREY, linewidth=1.2, linestyle=":", label="bound, ln of the keys"
    )
    colours = colormaps["viridis"](np.linspace(0, 0.88, len(values)))
    for n, (line, colour) in enumerate(zip(binned, colours, strict=True)):
        ax.plot(centre, line, color=colour, linewidth=1.8, label=f"layer {n + 1}")
    plots.mark_length(ax, trained, f"trained on {trained:,}")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(LogLocator(base=2, numticks=7))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    ax.xaxis.set_minor_locator(NullLocator())


def head_scores(results: Results) -> "Figure":
    """Positional-head scores of every layer and head at the trained length."""
    rows, columns = plots.grid(len(results))
    scores = [_array(result["positional_heads"][0]["score"]) for result in results.values()]
    tallest = max(len(score) for score in scores)
    height = 0.7 + rows * (1.1 + min(0.42 * max(tallest, 3), 4.0))
    figure, axes = plots.panels(rows, columns, height=height)
    for n, (name, score) in enumerate(zip(results, scores, strict=True)):
        image = _heat_map(axes[n], score)
        axes[n].set_title(plots.label(name), loc="left", fontsize=10)
        if n % columns == 0:
            axes[n].set_ylabel("layer")
        axes[n].set_xlabel("head")
    plots.hide(axes[len(results) :])
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label("positional-head score")
    bar.outline.set_visible(False)
    return figure


def _heat_map(ax: "Axes", score: np.ndarray) -> Any:
    """The image; grey where a head sees no far key, and the figures where there is room."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    colours = colormaps["RdBu_r"].with_extremes(bad="#d9d9d9")
    layers, count = score.shape
    extent = (0.5, count + 0.5, layers + 0.5, 0.5)
    image = ax.imshow(score, cmap=colours, vmin=-1, vmax=1, aspect="auto", extent=extent)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    if score.size <= NUMBERED and count <= 8:
        for (layer, head), value in np.ndenumerate(score):
            text = "–" if np.isnan(value) else f"{value:.2f}"
            colour = "white" if abs(value) > 0.6 else "#222222"
            ax.text(head + 1, layer + 1, text, ha="center", va="center", fontsize=8, color=colour)
    return image


def _array(values: Sequence[Sequence[float | None]]) -> np.ndarray:
    """null as nan."""
    return np.array(values, float)
