"""What a report knows of a run: its config, its metrics, its newest evaluation."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lcm.errors import UserError
from lcm.evaluation.documents import EvaluationError
from lcm.evaluation.results import ATTENTION, STATES, load, load_analysis

ANALYSES = ATTENTION, STATES  # kinds of results of `lcm analyse`, which names of files begin with
PASSKEY_FILES = "passkey*.json"


class ReportError(UserError):
    """A workdir cannot be reported on, or the report cannot be written."""


class Run(NamedTuple):
    """One workdir, as far as it could be read; `notes` says what could not.

    analyses: what `lcm analyse` found at the newest step it was run on, by kind, a result for each
        variant.
    """

    name: str
    path: Path
    config: dict[str, Any]  # flat: {"model.depth": 4}
    metrics: list[dict[str, Any]]  # one per step, in order of steps
    evaluation: dict[str, Any] | None
    notes: list[str]
    analyses: dict[str, list[dict[str, Any]]]

    def about(self, key: str) -> Any:
        """What the evaluation was told of the run (parameters, tokenizer, ...), or None."""
        return (self.evaluation or {}).get("about", {}).get(key)


def read_all(workdirs: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read workdirs and give each a name of its own, the shortest end of its path that does.

    Raises ReportError if one does not exist or holds nothing to report.
    """
    paths = [Path(os.path.abspath(workdir)) for workdir in workdirs]
    if not paths:
        raise ReportError("no workdir given: name one or more, as in `lcm report runs/a runs/b`")
    if len(set(paths)) < len(paths):
        raise ReportError("a workdir was given twice: name each once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [read(path, "/".join(path.parts[-depth:])) for path in paths]


def read(path: Path, name: str) -> Run:
    """Read one workdir. Raises ReportError if it does not exist or holds nothing to report."""
    if not path.is_dir():
        raise ReportError(f"workdir {path} does not exist: check the path")
    config, config_notes = _config(path / "config.json")
    metrics, metric_notes = _metrics(path / "metrics.jsonl")
    evaluation, evaluation_notes = _newest_evaluation(path / "eval")
    notes = [*config_notes, *metric_notes, *evaluation_notes]
    analyses = {kind: _newest_analyses(path / "eval", kind, notes) for kind in ANALYSES}
    if not metrics and evaluation is None and not any(analyses.values()):
        raise ReportError(
            f"workdir {path} holds neither metrics nor evaluations: train or evaluate there first"
            + "".join(f" ({note})" for note in notes)
        )
    return Run(name, path, config, metrics, evaluation, notes, analyses)


def read_result(file: Path) -> Run:
    """One evaluation of a workdir, whichever is the newest there, and nothing else of it."""
    folder = file.parent.parent
    return Run(folder.name, folder, {}, [], load(file), [], {})


def by_name(runs: Sequence[Run], kind: str) -> dict[str, dict[str, Any]]:
    """Analyses of a kind by the run's name, with the overrides of a variant behind it."""
    return {
        ", ".join([run.name, *result["about"]["overrides"]]): result
        for run in runs
        for result in run.analyses.get(kind, ())
    }


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; an empty mapping stays as a value."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _config(path: Path) -> tuple[dict[str, Any], list[str]]:
    if not path.exists():
        return {}, ["no config.json"]
    try:
        return flatten(json.loads(path.read_text(encoding="utf-8"))), []
    except (OSError, ValueError, AttributeError) as error:
        return {}, [f"config.json cannot be read: {error}"]


def _metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of metrics that have a step; a step run again after a resume replaces the first."""
    if not path.exists():
        return [], ["no metrics.jsonl"]
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        return [], [f"metrics.jsonl cannot be read: {error.strerror}"]
    by_step: dict[int, dict[str, Any]] = {}
    broken = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            by_step[int(row["step"])] = row
        except (ValueError, KeyError, TypeError, OverflowError):
            broken += [number] if line.strip() else []
    notes = []
    if broken and broken[-1] == len(lines):
        broken.pop()
        notes.append("the last line of metrics.jsonl is cut off (a killed run); it was left out")
    if broken:
        shown = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        notes.append(
            f"{len(broken)} lines of metrics.jsonl are no records with a step and were left out:"
            f" {shown}"
        )
    return [by_step[step] for step in sorted(by_step)], notes


def _newest_evaluation(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The evaluation of the latest step, or of the last name where steps are not told."""
    found, notes = [], []
    others = {
        path
        for name in (*(f"{kind}-*.json" for kind in ANALYSES), PASSKEY_FILES)
        for path in folder.glob(name)
    }
    for path in sorted(set(folder.glob("*.json")) - others):
        try:
            result = load(path)
            found.append((result["about"].get("step") or 0, path.name, result))
        except EvaluationError as error:
            notes.append(str(error))
    if not found:
        return None, notes
    *older, (_, name, result) = sorted(found, key=lambda entry: entry[:2])
    if older:
        notes.append(f"shown is eval/{name}; {len(older)} earlier evaluations are not")
    return result, notes


def _newest_analyses(folder: Path, kind: str, notes: list[str]) -> list[dict[str, Any]]:
    """The results of the latest step, plain first, then its variants by name."""
    found = []
    for path in sorted(folder.glob(f"{kind}-*.json"), key=lambda path: path.stem):
        try:
            found.append(load_analysis(path, kind))
        except EvaluationError as error:
            notes.append(str(error))
    newest = max((_step(result) for result in found), default=None)
    return [result for result in found if _step(result) == newest]


def _step(result: dict[str, Any]) -> int:
    return result["about"]["step"]
