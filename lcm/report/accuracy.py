"""Accuracy by the length of a task: a table, a picture, and the spread over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

from lcm.report import plots
from lcm.report.sections import Picture, Section
from lcm.report.tables import Table, interval

Curves = Mapping[str, Sequence[dict[str, Any]]]  # by name, points with length and by_seed
_COLUMNS = 12


def accuracy(title: str, curves: Curves, trained_to: int, text: Sequence[str] = ()) -> Section:
    """Curves of exact match against length, side by side; lengths past `trained_to` are new."""
    tables = [table(curves, trained_to), spread(curves, trained_to)]
    return Section(title, text, tables, [accuracy_picture(title, curves, trained_to)])


def accuracy_picture(title: str, curves: Curves, trained_to: int) -> Picture:
    """Exact match against length, a curve each."""
    name = "".join(c if c.isalnum() else "-" for c in title.lower())
    best = ", ".join(f"{n}: {_mean(points, trained_to):.2f}" for n, points in curves.items())
    return Picture(
        name,
        plots.png(plots.accuracy_curve(curves, trained_to)),
        f"Line plot of exact match against length. Mean past length {trained_to}, {best}.",
        "Exact match of greedy answers by length; bars are 95 % Wilson intervals over the answers"
        " of all seeds. The dashed line is the longest length trained on.",
    )


def table(curves: Curves, trained_to: int) -> Table:
    """Accuracy with half the width of its interval, at a dozen of the lengths at the most."""
    lengths = _shown([point["length"] for point in next(iter(curves.values()))])
    rows = []
    for name, points in curves.items():
        at = {point["length"]: point for point in points}
        rows.append([name, *(interval(at[n], 2) for n in lengths)])
    header = [f"{n} (trained)" if n <= trained_to else str(n) for n in lengths]
    return Table("Exact match by length", ["", *header], rows)


def spread(curves: Curves, trained_to: int) -> Table:
    """Mean accuracy over the lengths past those trained on, of the worst and of the best seed."""
    rows = []
    for name, points in curves.items():
        new = [point["by_seed"] for point in points if point["length"] > trained_to]
        by_seed = sorted(sum(column) / len(new) for column in zip(*new, strict=True))
        each = ", ".join(f"{value:.2f}" for value in by_seed)
        rows.append([name, f"{sum(by_seed) / len(by_seed):.2f}", each])
    return Table("Mean over the new lengths", ["", "all seeds", "seed by seed, sorted"], rows)


def _mean(points: Sequence[dict[str, Any]], trained_to: int) -> float:
    new = [point["value"] for point in points if point["length"] > trained_to]
    return sum(new) / len(new)


def _shown(lengths: Sequence[int]) -> list[int]:
    """The lengths, or some of them, the last one included."""
    step = -(-len(lengths) // _COLUMNS)
    return sorted({*lengths[::step], lengths[-1]})
