"""Tables of runs, as plain text for a terminal and as HTML."""

import html
import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

from lcm.evaluation.documents import EvaluationError
from lcm.evaluation.results import loss_differences
from lcm.report.runs import Run

MISSING = "–"


class Table(NamedTuple):
    """Header and rows of text; the first column names the row, the others hold figures.

    `prose` tables hold words instead: read from the left, broken into lines.
    """

    caption: str
    header: list[str]
    rows: list[list[str]]
    prose: bool = False


def markdown(table: Table) -> str:
    """The table without its caption, as a README has it."""
    rule = ["---"] * len(table.header)
    return "\n".join(f"| {' | '.join(row)} |" for row in (table.header, rule, *table.rows))


def captioned(tables: Iterable[Table]) -> str:
    """All tables, each behind its caption."""
    return "\n".join(f"{each.caption}:\n\n{markdown(each)}\n" for each in tables)


def number(value: float | None, digits: int = 3) -> str:
    """A figure to some decimals, or a dash."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def over_seeds(seeds: Sequence[Sequence[float]], digits: int = 3) -> list[str]:
    """Means of figures over seeds, then the most that two seeds differ by in any of them."""
    columns = list(zip(*seeds, strict=True))
    apart = max(max(each) - min(each) for each in columns) if len(seeds) > 1 else None
    return [*(number(fmean(each), digits) for each in columns), number(apart, digits)]


def interval(point: dict[str, float | None] | None, digits: int = 3) -> str:
    """`1.482 ± 0.031`, the half-width of the confidence interval after the sign."""
    if point is None or point["value"] is None:
        return MISSING
    if point["low"] is None or point["high"] is None:
        return number(point["value"], digits)
    return (
        f"{number(point['value'], digits)} ± {number((point['high'] - point['low']) / 2, digits)}"
    )


def loss_unit(runs: Sequence[Run]) -> str:
    """`nats per byte` if every tokenizer was told to be bytes, else `nats per token`."""
    evaluated = [run for run in runs if run.evaluation]
    in_bytes = evaluated and all(run.about("tokenizer") == "bytes" for run in evaluated)
    return "nats per byte" if in_bytes else "nats per token"


def effective_length(entry: dict[str, Any]) -> str:
    """`512 (256 to 1,024)`; `≥ 2,048` where the longest length tested still passes."""
    if not entry["value"]:
        return f"< {entry['lengths'][0]:,}"
    mark = "≥ " if entry["longest_tested"] else ""
    text = f"{mark}{entry['value']:,.0f}"
    if entry["low"] is not None and entry["low"] != entry["high"]:
        text += f" ({entry['low']:,.0f} to {entry['high']:,.0f})"
    return text


def _evaluated(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.evaluation]


def _multiples(runs: Sequence[Run]) -> dict[float, str]:
    """Multiples that any run has, with a heading each: `2× (512)` if the lengths agree."""
    lengths: dict[float, set[int]] = {}
    for run in _evaluated(runs):
        for point in run.evaluation["lengths"]:
            lengths.setdefault(point["multiple"], set()).add(point["length"])
    return {
        multiple: f"{multiple:g}×" + (f" ({next(iter(at)):,})" if len(at) == 1 else "")
        for multiple, at in sorted(lengths.items())
    }


def lengths_table(runs: Sequence[Run]) -> Table:
    """Loss at each multiple of the training length, bits per byte and effective length."""
    multiples = _multiples(runs)
    rows = []
    for run in _evaluated(runs):
        points = {point["multiple"]: point for point in run.evaluation["lengths"]}
        parameters = run.about("parameters")
        rolled = {
            entry["protocol"]: entry["bits_per_byte"] for entry in run.evaluation["perplexity"]
        }
        rows.append(
            [
                run.name,
                MISSING if parameters is None else f"{parameters:,}",
                *(interval(points.get(multiple, {}).get("loss")) for multiple in multiples),
                interval(rolled.get("sliding")),
                effective_length(run.evaluation["effective_length"]),
            ]
        )
    heads = [f"loss at {heading}" for heading in multiples.values()]
    header = ["run", "parameters", *heads, "bits per byte (sliding)", "effective length"]
    return Table(f"Loss ({loss_unit(runs)}) at multiples of the training length", header, rows)


def beyond_table(runs: Sequence[Run]) -> Table:
    """Loss at positions past the training length, and its excess over the same tokens within."""
    multiples = {multiple: head for multiple, head in _multiples(runs).items() if multiple > 1}
    rows = []
    for run in _evaluated(runs):
        points = {point["multiple"]: point["beyond"] or {} for point in run.evaluation["lengths"]}
        cells = [
            interval(points.get(multiple, {}).get(key))
            for multiple in multiples
            for key in ("loss", "excess")
        ]
        rows.append([run.name, *cells])
    header = [f"{key} at {head}" for head in multiples.values() for key in ("loss", "excess")]
    return Table(
        f"Positions beyond the training length only ({loss_unit(runs)})", ["run", *header], rows
    )


def perplexity_table(runs: Sequence[Run]) -> Table:
    """Perplexity at the training length under both protocols, or at each length."""
    rows = [
        [
            run.name,
            entry["protocol"],
            f"{entry['length']:,}",
            f"{entry['stride']:,}",
            f"{entry['tokens']:,}",
            interval(entry["loss"]),
            interval(entry["perplexity"], 2),
            interval(entry["bits_per_byte"]),
        ]
        for run in _evaluated(runs)
        for entry in run.evaluation["perplexity"]
    ]
    header = [
        "run",
        "protocol",
        "window",
        "stride",
        "tokens",
        "loss",
        "perplexity",
        "bits per byte",
    ]
    return Table("Perplexity", header, rows)


def differences_table(runs: Sequence[Run]) -> Table | None:
    """Loss of each run minus that of the first, paired over documents; None where not paired."""
    first, *others = _evaluated(runs) or [None]
    rows, multiples = [], _multiples(runs)
    for run in others:
        try:
            differences = loss_differences(run.evaluation, first.evaluation)
        except EvaluationError:
            continue
        lengths = {point["multiple"]: point["length"] for point in run.evaluation["lengths"]}
        found = (differences.get(lengths.get(multiple)) for multiple in multiples)
        rows.append([run.name, *(interval(d and d._asdict()) for d in found)])
    if not rows:
        return None
    return Table(
        f"Loss minus that of {first.name} on the same documents ({loss_unit(runs)})",
        ["run", *multiples.values()],
        rows,
    )


def config_table(runs: Sequence[Run]) -> Table | None:
    """The config keys in which runs differ; None if there are none."""
    keys = sorted({key for run in runs for key in run.config} - {"workdir"})
    texts = {key: [str(run.config.get(key, MISSING)) for run in runs] for key in keys}
    rows = [[key, *values] for key, values in texts.items() if len(set(values)) > 1]
    header = ["key", *(run.name for run in runs)]
    return Table("Config keys that differ", header, rows, prose=True) if rows else None


def training_table(runs: Sequence[Run]) -> Table:
    """Last step, its loss, the lowest loss, and the median speed of training."""
    rows = []
    for run in runs:
        losses = _logged(run, "loss")
        speeds = _logged(run, "tokens_per_second")
        rows.append(
            [
                run.name,
                number(run.metrics[-1]["step"] if run.metrics else None, 0),
                number(losses[-1] if losses else None),
                number(min(losses, default=None)),
                number(median(speeds) if speeds else None, 0),
            ]
        )
    header = ["run", "last step", "last loss", "lowest loss", "tokens/s (median)"]
    return Table("Training, as logged", header, rows)


def _logged(run: Run, key: str) -> list[float]:
    values = [row.get(key) for row in run.metrics]
    return [v for v in values if isinstance(v, int | float) and math.isfinite(v)]


def summary(runs: Sequence[Run]) -> str:
    """The tables for a terminal: loss by length, or the training of runs not yet evaluated."""
    if not _evaluated(runs):
        return to_text(training_table(runs))
    shown = [lengths_table(runs), beyond_table(runs), perplexity_table(runs)]
    return "\n\n".join(to_text(table) for table in shown if len(table.header) > 1)


def to_text(table: Table) -> str:
    """The table for a terminal: caption, header, rule, rows, columns two spaces apart."""
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *figures = (
            cell.ljust(w) if i == 0 or table.prose else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *figures]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([table.caption, "", line(table.header), rule, *map(line, table.rows)])


def to_html(table: Table) -> str:
    """The table with caption and header scopes; every text escaped."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.header)
    rows = []
    for first, *figures in table.rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in figures)
        rows.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    caption, kind = html.escape(table.caption), "text" if table.prose else "figures"
    body = "\n".join(rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">'
        f'<table class="{kind}"><caption>{caption}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )
