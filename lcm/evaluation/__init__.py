"""Evaluation of length: protocols, statistics, and the runs they are applied to.

What needs a model, and so jax, is imported when first used: reports read results without it.
"""

import importlib
from typing import Any

from lcm.evaluation.documents import Document, EvaluationError
from lcm.evaluation.perplexity import evaluate
from lcm.evaluation.results import loss_differences, save

_OF_MODELS = ("Model", "evaluate_model", "evaluate_run", "heldout", "load", "scorer")

__all__ = [
    "Document",
    "EvaluationError",
    "evaluate",
    "loss_differences",
    "save",
    *_OF_MODELS,
]


def __getattr__(name: str) -> Any:
    if name in _OF_MODELS:
        return getattr(importlib.import_module("lcm.evaluation.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
