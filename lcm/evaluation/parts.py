"""Analyses of a model in parts, at the trained length and at a longer one, as plain JSON."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lcm import config, models
from lcm.errors import ConfigError
from lcm.evaluation.documents import Document, EvaluationError
from lcm.evaluation.model import Model
from lcm.evaluation.results import SCHEMA
from lcm.progress import progress
from lcm.types import Batch

MULTIPLE = 4  # of the trained length, where no other length is asked for
ROWS = 8  # of the longer length, at the most


def longer(cfg: Any, params: Any, length: int) -> int:
    """The longer length, `MULTIPLE` times the trained one for 0, of a model that can be read.

    Raises:
        ConfigError: if it is shorter, or config and parameters are none of a model.
    """
    config.check_keys(cfg)
    models.check_params(cfg, params)
    trained = cfg.data.length
    if not length:
        return MULTIPLE * trained
    if length < trained:
        raise ConfigError(
            f"--length={length} is shorter than the trained length {trained} (data.length): give "
            f"{trained} or more, or leave it out for {MULTIPLE * trained}"
        )
    return length


def head(
    kind: str, model: Model, length: int, rows: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """What a result says of the model and of what was read."""
    cfg = model.cfg
    return {
        "schema": SCHEMA,
        "kind": kind,
        "about": {
            "run": cfg.name,
            "step": model.step,
            "parameters": models.parameter_count(cfg),
            "tokenizer": cfg.data.tokenizer,
            "positions": cfg.model.positions.name,
            "overrides": [o for o in overrides if not o.startswith("eval.")],
        },
        "settings": {
            "train_length": cfg.data.length,
            "length": length,
            "rows": rows,
            "seed": cfg.seed,
        },
    }


def found(steps: dict[str, Callable[[], Any]], tokens: int, title: str) -> dict[str, Any]:
    """Each result, or the reason why there is none. Each step reads all tokens at least once."""
    results = {}
    with progress(title) as report:
        for n, (name, step) in enumerate(steps.items()):
            report(n * tokens, len(steps) * tokens, name.replace("_", " "))
            try:
                results[name] = step()
            except ConfigError as error:  # lengths and parameters were checked: it is the model
                results[name] = {"left_out": str(error)}
        report(len(steps) * tokens, len(steps) * tokens)
    return results


def text_rows(documents: Sequence[Document], length: int, count: int, seed: int) -> Batch:
    """Up to `count` rows of held-out text: the first windows of documents, then the second ones.

    Raises:
        EvaluationError: naming the longest document, if none reaches the length.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    windows = [(n, d) for d in order for n in range(len(documents[d].tokens_N) // length)]
    if not windows:
        longest = max(documents, key=lambda document: len(document.tokens_N))
        raise EvaluationError(
            f"no held-out document reaches --length={length} tokens: the longest, "
            f"{longest.name!r}, has {len(longest.tokens_N)}; give --length of that or less"
        )
    chosen = sorted(windows, key=lambda window: window[0])[:count]
    at = [(documents[d], slice(n * length, (n + 1) * length)) for n, d in chosen]
    return _batch(
        np.stack([document.tokens_N[where] for document, where in at]),
        np.stack([document.targets_N[where] for document, where in at]),
    )


def cut(batch: Batch, length: int) -> Batch:
    """The same rows as shorter ones that begin at position 0; a rest is left out."""
    whole = batch.tokens_BL.shape[1] // length * length
    return _batch(*(x[:, :whole].reshape(-1, length) for x in (batch.tokens_BL, batch.targets_BL)))


def _batch(tokens_BL: np.ndarray, targets_BL: np.ndarray) -> Batch:
    where = models.default_context(tokens_BL.shape)
    return Batch(tokens_BL, targets_BL, where, np.ones(tokens_BL.shape, np.float32))


def plain(values: np.ndarray) -> Any:
    """Nested lists for JSON to five decimals: "inf" for infinite, null for what is not there."""
    if np.ndim(values):
        return [plain(value) for value in values]
    if np.isnan(values):
        return None
    return "inf" if np.isinf(values) else round(float(values), 5)
