"""Evaluation of length: protocols, statistics, and the runs they are applied to.

What needs a model, and so jax, is imported when first used: reports read results without it.
"""

import importlib
from typing import Any

from lcm.evaluation.documents import Document, EvaluationError
from lcm.evaluation.results import load_analysis, loss_differences, save

_LATER = {
    "evaluate": "perplexity",
    "evaluate_pretrained": "pretrained",
    "exact_match": "exact_match",
    "Model": "model",
    "evaluate_model": "model",
    "evaluate_run": "model",
    "heldout": "model",
    "load": "model",
    "scorer": "model",
    "analyse_model": "analysis",
    "analyse_run": "analysis",
    "align_temperature": "attention",
    "gaussian_temperature": "attention",
    "statistic_by_position": "attention",
    "statistics_by_position": "attention",
    "bias_weights": "receptive_field",
    "empirical_receptive_field": "receptive_field",
    "theoretical_receptive_field": "receptive_field",
    "effective_remembrance": "remembrance",
    "state_norms": "remembrance",
    "PositionalHeads": "heads",
    "positional_heads": "heads",
    "without_heads": "heads",
}

__all__ = ["Document", "EvaluationError", "load_analysis", "loss_differences", "save", *_LATER]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"lcm.evaluation.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
