"""The section on recurrent states: what predictions rest on, and how states grow."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from lcm.report import plots, states_plots
from lcm.report.attention import left_out_table
from lcm.report.runs import Run, by_name
from lcm.report.sections import Picture, Section
from lcm.report.tables import MISSING, Table, number

Results = Mapping[str, dict[str, Any]]  # what `lcm analyse` wrote, by name

PARTS = {"distances": "mean distances", "norms": "norms of states"}


def states(runs: Sequence[Run]) -> list[Section]:
    """What `lcm analyse` found of recurrent layers; nothing if it was run on none."""
    results = by_name(runs, "states")
    if not results:
        return []
    pictures = [_remembrance_picture(results)]
    grown = {name: each for name, each in results.items() if _growth(each)}
    if grown:
        pictures.append(_norms_picture(grown))
    return [Section("Recurrent states", _TEXT, state_tables(runs), pictures)]


def state_tables(runs: Sequence[Run]) -> list[Table]:
    results = by_name(runs, "states")
    if not results:
        return []
    tables = [make(results) for make in (remembrance_table, distances_table, norms_table)]
    return [table for table in (*tables, left_out_table(results, PARTS)) if table]


def remembrance_table(results: Results) -> Table:
    """Effective remembrance without the first half, and without all but the trained length."""
    rows = []
    for name, result in results.items():
        trained = result["settings"]["train_length"]
        for entry in result["remembrance"]:
            length = entry["length"]
            found = dict(zip(entry["starts"], entry["distance"], strict=True))
            last = number(found[length - trained]) if length > trained else MISSING
            rows.append([name, f"{length:,}", number(_half(entry)), last])
    header = ["run", "length", "without the first half", "with the trained length alone"]
    return Table("Effective remembrance (total variation)", header, rows)


def distances_table(results: Results) -> Table | None:
    """Mean distances over all heads and of the one that reads furthest, in tokens."""
    rows = []
    for name, result in results.items():
        for entry in [] if "left_out" in result["distances"] else result["distances"]:
            heads = {
                f"{layer['layer'] + 1}.{n + 1}": distance
                for layer in entry["layers"]
                for n, distance in enumerate(layer["by_head"])
                if distance is not None
            }
            if heads:
                most = max(heads, key=heads.__getitem__)
                figures = [number(fmean(heads.values()), 1), number(heads[most], 1)]
                rows.append([name, f"{entry['length']:,}", *figures, most])
    header = ["run", "length", "mean of heads", "furthest", "which (layer.head)"]
    return Table("Mean distance of hidden attention in tokens", header, rows) if rows else None


def norms_table(results: Results) -> Table | None:
    """The array of states that grows most from the trained length on."""
    rows = []
    for name, result in results.items():
        if grown := _growth(result):
            growth, line, at = max(grown, key=lambda each: each[0])
            ends = [number(states_plots.values(line["mean"])[n]) for n in (at, -1)]
            rows.append([name, states_plots.named(line), *ends, number(growth, 2)])
    header = ["run", "what grows most", "norm at the trained length", "at the longer", "growth"]
    return Table("Norms of states, means over heads and rows", header, rows) if rows else None


def _half(entry: dict[str, Any]) -> float:
    """Of the first start at or behind the middle."""
    pairs = zip(entry["starts"], entry["distance"], strict=True)
    return next(found for start, found in pairs if 2 * start >= entry["length"])


def _growth(result: dict[str, Any]) -> list[tuple[float, dict[str, Any], int]]:
    """How many times as large each array's mean norm is at the end as at the trained length, with
    the array and where that length is; nothing where norms were left out or are no numbers."""
    norms, trained = result["norms"], result["settings"]["train_length"]
    if "left_out" in norms:
        return []
    at = max(n for n, position in enumerate(norms["positions"]) if position <= trained)
    found = []
    for line in norms["layers"]:
        first, last = (states_plots.values(line["mean"])[n] for n in (at, -1))
        if first > 0 and not np.isnan(last):
            found.append((last / first, line, at))
    return found


def _remembrance_picture(results: Results) -> Picture:
    last = {name: result["remembrance"][-1] for name, result in results.items()}
    halves = "; ".join(f"{name}: {number(_half(entry), 3)}" for name, entry in last.items())
    return Picture(
        "states-remembrance",
        plots.png(states_plots.remembrance(results)),
        "Line plots of effective remembrance against the number of first tokens left out, a line"
        f" for each run. Without the first half, {halves}.",
        "How far the next token's distribution moves, in total variation, when so many of the first"
        " tokens are left out of rows of the longer length; means over rows of held-out text."
        " Dashed: the trained length is left.",
    )


def _norms_picture(results: Results) -> Picture:
    most = "; ".join(
        f"{name}: {max(growth for growth, _, _ in _growth(result)):.2f} times"
        for name, result in results.items()
    )
    return Picture(
        "states-norms",
        plots.png(states_plots.norms(results)),
        "Line plots of norms of states against position, a line for each layer's arrays. Largest"
        f" growth behind the trained length, {most}.",
        "Means over heads and rows of held-out text of the longer length, both axes logarithmic;"
        " one panel for each run. Dashed: the trained length.",
    )


_TEXT = [
    "Effective remembrance is the total variation between the distributions of the next token with"
    " and without the first tokens of a text (arXiv:2507.02782, section 3.2): near 0 where what is"
    " left out does not matter. A model that was trained on short texts and fails on long ones is"
    " often moved by what is long past: high values where the trained length and more is left.",
    "The mean distance (MMD, arXiv:2406.14528) is how far back the last token's output comes from,"
    " by the attention that steps and decays make. Where it grows no more behind the trained"
    " length, a head does not read further than it learned to; lcm.models.distance slows the clocks"
    " of those that read furthest.",
    "Norms of states that go on growing behind the trained length reach values that the model never"
    " learned to read (arXiv:2410.07145). Training that begins rows with other states than empty"
    " ones (train.initial_state), or model.extension, is what helps.",
]
