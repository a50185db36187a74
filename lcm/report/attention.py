"""The section on attention: entropy by position, heads, receptive fields, temperatures."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from lcm.report import attention_plots, plots
from lcm.report.attention_plots import Results
from lcm.report.runs import Run, by_name
from lcm.report.sections import Picture, Section
from lcm.report.tables import MISSING, Table, number

PARTS = {
    "statistics": "statistics",
    "positional_heads": "positional heads",
    "theoretical": "theoretical receptive field",
    "empirical": "empirical receptive field",
    "aligned_temperature": "aligned temperature",
}


def attention(runs: Sequence[Run]) -> list[Section]:
    """What `lcm analyse` found of the runs; nothing if it was run on none."""
    results = by_name(runs, "attention")
    if not results:
        return []
    drawn = {"statistics": _entropy_picture, "positional_heads": _heads_picture}
    pictures = [draw(some) for key, draw in drawn.items() if (some := having(results, key))]
    return [Section("Attention", _text(results), _tables(results), pictures)]


def attention_tables(runs: Sequence[Run]) -> list[Table]:
    results = by_name(runs, "attention")
    return _tables(results) if results else []


def _tables(results: Results) -> list[Table]:
    makers = (fields_table, by_length_table, temperatures_table, left_out_table)
    return [table for table in (make(results) for make in makers) if table]


def part(result: dict[str, Any], name: str) -> Any:
    """A part of a result, wherever it stands; None if it was left out."""
    found = _whole(result, name)
    return None if _reason(found) else found


def having(results: Results, name: str) -> dict[str, dict[str, Any]]:
    """The results in which a part is not left out."""
    return {key: result for key, result in results.items() if part(result, name)}


def fields_table(results: Results) -> Table:
    """Theoretical field, mean and maximum over layers and heads, beside the empirical one."""
    theory = {name: _heads_field(result) for name, result in results.items()}
    means = {name: float(np.mean(field)) for name, field in theory.items() if field is not None}
    measured = {n: part(r, "empirical")["tokens"] for n, r in having(results, "empirical").items()}
    by_trf, by_erf = ranks(means), ranks(measured)
    rows = [
        [
            name,
            _tokens(means.get(name)),
            _tokens(None if theory[name] is None else float(np.max(theory[name]))),
            _tokens(measured.get(name)),
            by_trf.get(name, MISSING),
            by_erf.get(name, MISSING),
        ]
        for name in results
    ]
    header = ["run", "TRF (mean)", "TRF (largest)", "ERF", "order by TRF", "order by ERF"]
    return Table("Receptive fields in tokens", header, rows)


def by_length_table(results: Results) -> Table | None:
    """Mean entropy, largest probability and allocation at the trained and at the longer length."""
    rows = []
    for name, result in having(results, "statistics").items():
        heads = {entry["length"]: entry for entry in part(result, "positional_heads") or []}
        for entry in result["statistics"]:
            means = [number(float(np.mean(entry[key]))) for key in ("entropy", "largest")]
            slow = number(_mean(heads.get(entry["length"], {}).get("allocation")))
            top = heads.get(entry["length"], {}).get("top", [])
            named = ", ".join(f"{layer + 1}.{head + 1}" for layer, head in top) or MISSING
            rows.append([name, f"{entry['length']:,}", *means, slow, named])
    header = ["run", "length", "entropy (nats)", "largest probability"]
    header += ["allocation to slow pairs", "positional heads (layer.head)"]
    return (
        Table("Attention by length, means over positions and heads", header, rows) if rows else None
    )


def temperatures_table(results: Results) -> Table | None:
    """Temperatures by both statistics for the longer length."""
    rows = [
        [name, f"{result['settings']['length']:,}"]
        + [number(result["aligned_temperature"][key]) for key in ("entropy", "largest")]
        for name, result in having(results, "aligned_temperature").items()
    ]
    header = ["run", "length", "T by entropy", "T by largest probability"]
    return Table("Aligned temperatures", header, rows) if rows else None


def left_out_table(results: Results, parts: Mapping[str, str] = PARTS) -> Table | None:
    """What encodings or models do not have, and why, of parts by what they are called."""
    rows = [
        [name, text, reason]
        for name, result in results.items()
        for key, text in parts.items()
        for reason in [_reason(_whole(result, key))]
        if reason
    ]
    return Table("Left out", ["run", "what", "why"], rows, prose=True) if rows else None


def ranks(values: dict[str, float]) -> dict[str, str]:
    """Places from the shortest on; equal values share one."""
    return {
        name: f"{1 + sum(other < value for other in values.values())}"
        for name, value in values.items()
    }


def agreement(results: Results) -> tuple[int, int]:
    """Pairs of runs that TRF and ERF order alike, among those that both tell apart."""
    some = having(having(results, "theoretical"), "empirical").values()
    points = [(float(np.mean(_heads_field(r))), part(r, "empirical")["tokens"]) for r in some]
    apart = [(a, b) for a, b in combinations(points, 2) if a[0] != b[0] and a[1] != b[1]]
    return sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in apart), len(apart)


def _text(results: Results) -> list[str]:
    same, pairs = agreement(results)
    order = (
        f" Both tell {pairs} pairs of these runs apart and order {same} of them alike."
        if pairs
        else ""
    )
    return [
        "Entropy is at most ln(i + 1) for the query at position i, where it is even over all keys;"
        " where it bends past the trained length, loss begins to rise (arXiv:2404.12224).",
        "TRF, the theoretical receptive field of a bias, is the least window that holds all but 1 %"
        " of the sum of its weights; ∞ where that sum diverges. ERF, the empirical one, is the"
        " least window of every layer with which perplexity at the trained length stays within 1 %"
        " of that without a window; in a stack of layers, tokens further back are still heard of"
        " through others. Exploring Transformer Extrapolation (arXiv:2307.10156) finds TRF to order"
        " models as ERF does." + order,
        "A positional head (arXiv:2410.08703) reads from afar by its slow rotary pairs: its score"
        " is the rank correlation of a pair's index with what it adds to scores of far keys, its"
        " allocation the share of the slower half. The heads named are the best twentieth.",
        "The aligned temperature T, by which all scores are divided (model.positions=aligned+...),"
        " gives attention at the longer length the entropy, or the largest probability, that it has"
        " at the trained one (arXiv:2311.00684); 1 where it has it already.",
    ]


def _entropy_picture(results: Results) -> Picture:
    ends = "; ".join(
        f"{name}: {number(_mean(r['statistics'][0]['entropy']), 2)} nats at the trained length,"
        f" {number(_mean(r['statistics'][-1]['entropy']), 2)} at the longer"
        for name, r in results.items()
    )
    return Picture(
        "attention-entropy",
        plots.png(attention_plots.entropy_by_position(results)),
        f"Line plots of the entropy of attention against position, a line for each layer. Means,"
        f" {ends}.",
        "Mean entropy over heads and rows of held-out text of the longer length, averaged in bins"
        " of position; one panel for each run. Dotted: the bound. Dashed: the trained length.",
    )


def _heads_picture(results: Results) -> Picture:
    best = "; ".join(f"{name}: {_best(r['positional_heads'][0])}" for name, r in results.items())
    return Picture(
        "attention-heads",
        plots.png(attention_plots.head_scores(results)),
        f"Heat maps of positional-head scores, layers by heads. Highest scores, {best}.",
        "Scores at the trained length, far keys lying half of it back. 1: the slower a pair, the"
        " more it adds for far keys; -1: the faster. Grey: a head that sees no far key.",
    )


def _best(heads: dict[str, Any]) -> str:
    scores = [s for layer in heads["score"] for s in layer if s is not None]
    return number(max(scores), 2) if scores else "none"


def _whole(result: dict[str, Any], name: str) -> Any:
    return result["receptive_field"][name] if name not in result else result[name]


def _reason(found: Any) -> str | None:
    return found.get("left_out") if isinstance(found, dict) else None


def _heads_field(result: dict[str, Any]) -> np.ndarray | None:
    theory = part(result, "theoretical")
    return None if theory is None else np.array(theory["by_head"], float)


def _tokens(value: float | None) -> str:
    return "∞" if value is not None and math.isinf(value) else number(value, 0)


def _mean(values: Any) -> float | None:
    """Mean of what is there, of nested lists with null."""
    if values is None:
        return None
    array = np.array(values, float)
    return float(np.nanmean(array)) if np.isfinite(array).any() else None
