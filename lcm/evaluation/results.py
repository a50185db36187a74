"""Results of an evaluation on disk, and two of them compared document by document."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lcm.evaluation import statistics
from lcm.evaluation.documents import EvaluationError

SCHEMA = 1
KIND = "loss by length"
ATTENTION = "attention"  # the kind of what `lcm analyse` writes of models of attention alone
STATES = "states"  # and of those with recurrent layers
PASSKEY = "passkey"  # and of what `lcm evaluate --passkey` does
PARTS = {  # that the results of `lcm analyse` have
    ATTENTION: ("settings", "statistics", "positional_heads", "aligned_temperature"),
    STATES: ("settings", "remembrance", "distances", "norms"),
}


def save(result: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write a result as JSON, whole or not at all; folders are made. Raises EvaluationError."""
    path = Path(path)
    text = json.dumps(result, indent=1, allow_nan=False)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise EvaluationError(
            f"cannot write the evaluation to {path}: {error.strerror}; free space there or choose"
            " another workdir"
        ) from error
    return path


def load(path: str | os.PathLike[str], kind: str = KIND) -> dict[str, Any]:
    """Read a result written by `save`. Raises EvaluationError for anything else."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"cannot read the evaluation {path}: {error.strerror}") from error
    except ValueError as error:
        raise EvaluationError(
            f"{path} is not JSON ({error}): delete it and evaluate again"
        ) from error
    if not isinstance(result, dict) or result.get("kind") != kind:
        raise EvaluationError(f"{path} is not an evaluation of {kind}")
    if result.get("schema") != SCHEMA:
        raise EvaluationError(
            f"{path} has schema {result.get('schema')}, this version reads {SCHEMA}: evaluate again"
        )
    return result


def load_analysis(path: str | os.PathLike[str], kind: str = ATTENTION) -> dict[str, Any]:
    """Read what `lcm analyse` wrote; infinite receptive fields, "inf" in JSON, are floats again.

    Raises EvaluationError for anything else.
    """
    result = load(path, kind)
    try:
        int(result["about"]["step"])
        for part in PARTS[kind]:
            result[part]
        field = result["receptive_field"]["theoretical"] if kind == ATTENTION else {}
        if "by_head" in field:
            field["by_head"] = [[float(w) for w in layer] for layer in field["by_head"]]
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"{path} is damaged ({error}): delete it and run lcm analyse again"
        ) from error
    return result


def loss_differences(
    a: Mapping[str, Any], b: Mapping[str, Any], *, replicates: int = 10_000, seed: int = 0
) -> dict[int, statistics.Interval]:
    """Loss of run a minus that of run b at each length both have, paired over documents.

    Raises EvaluationError unless both scored the same tokens of the same documents.
    """
    inventory = a["documents"]["long"]
    if inventory != b["documents"]["long"]:
        raise EvaluationError(
            "the two evaluations did not score the same documents: evaluate both with the same"
            " held-out documents, multiples, max_tokens and seed"
        )
    of_b = {point["length"]: point for point in b["lengths"]}
    return {
        point["length"]: statistics.paired_bootstrap(
            np.array(point["document_sums"]),
            np.array(of_b[point["length"]]["document_sums"]),
            np.array(inventory["tokens"]),
            replicates=replicates,
            seed=seed,
        )
        for point in a["lengths"]
        if point["length"] in of_b
    }
