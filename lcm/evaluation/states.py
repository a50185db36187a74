"""What a model with recurrent layers keeps, at the trained length and past it.

A recurrence fails beyond the lengths of its training where states reach what it never learned to
read: its prediction then rests on what is long past (effective remembrance, Ruiz and Gu, 2025,
arXiv:2507.02782), and its states go on growing (Chen et al., 2024, arXiv:2410.07145).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm import models
from lcm.evaluation import parts
from lcm.evaluation.model import Model, heldout
from lcm.evaluation.parts import plain
from lcm.evaluation.remembrance import effective_remembrance, state_norms
from lcm.evaluation.results import STATES
from lcm.models import ModelSpec, initial
from lcm.models.distance import mean_distances
from lcm.nn import RecurrentState

STARTS = 32  # of the texts whose first tokens are left out, for each length
POINTS = 64  # along the longer length, at the most, at which states are looked at


def analyse(model: Model, length: int, overrides: Sequence[str], title: str) -> dict[str, Any]:
    """Effective remembrance, mean distances of heads and norms of states, as plain JSON.

    Raises:
        UserError: if a length does not fit the model, or no document reaches it.
    """
    cfg, params = model.cfg, model.params
    spec = models.spec(cfg)
    models.check_backend(spec)
    models.check_limit(spec, length)
    long = parts.text_rows(heldout(cfg, model.tokenizer), length, parts.ROWS, cfg.seed)
    rows, trained = long.tokens_BL, cfg.data.length
    both = [rows[:, :n] for n in dict.fromkeys((trained, length))]
    steps: dict[str, Callable[[], Any]] = {
        "remembrance": lambda: [_remembrance(cfg, params, each) for each in both],
        "distances": lambda: [_distances(spec, params, each) for each in both],
        "norms": lambda: _norms(cfg, params, rows),
    }
    found = parts.found(steps, rows.size, title)
    return {**parts.head(STATES, model, length, len(rows), overrides), **found}


def _remembrance(cfg: Any, params: Any, tokens_BL: np.ndarray) -> dict[str, Any]:
    """EffRem without the first t tokens, for t along the text; one leaves the trained length."""
    length = tokens_BL.shape[1]
    starts = {length * n // STARTS for n in range(STARTS)} | {length - cfg.data.length}
    found = effective_remembrance(cfg, params, tokens_BL, sorted(starts))
    return {"length": length, "starts": sorted(starts), "distance": plain(found)}


def _distances(spec: ModelSpec, params: Any, tokens_BL: np.ndarray) -> dict[str, Any]:
    """Mean distance that each head reads from, of layers that have a hidden attention."""
    found = mean_distances(spec, params, jnp.asarray(tokens_BL))
    layers = [{"layer": n, "by_head": plain(distance_H)} for n, distance_H in found.items()]
    return {"length": tokens_BL.shape[1], "layers": layers}


def _norms(cfg: Any, params: Any, tokens_BL: np.ndarray) -> dict[str, Any]:
    """Mean over rows and heads, and the largest head's mean over rows, of each array of each
    recurrent layer after more and more tokens, the trained length among them."""
    trained, length = cfg.data.length, tokens_BL.shape[1]
    divisors = [n for n in range(1, trained + 1) if trained % n == 0]
    every = next((n for n in divisors if n * POINTS >= length), trained)
    whole = length // every * every
    found = state_norms(cfg, params, tokens_BL[:, :whole], every)  # of [T, n, B, H]
    lines = [
        {
            "layer": n * len(cfg.model.pattern) + kind,
            "array": array,
            "mean": plain(own_TBH.mean((1, 2))),
            "largest": plain(own_TBH.mean(1).max(1)),
        }
        for (kind, array), every_TNBH in zip(_arrays(cfg), found, strict=True)
        for n, own_TBH in enumerate(every_TNBH.swapaxes(0, 1))
    ]
    lines.sort(key=lambda line: line["layer"])
    return {"positions": list(range(every, whole + 1, every)), "layers": lines}


def _arrays(cfg: Any) -> list[tuple[int, str]]:
    """Kind of layer and name, "" for the only one, of each array that `state_norms` tells of."""
    state = jax.eval_shape(lambda: models.init_state(cfg, 1, 1))
    kinds = [n for n, own in enumerate(state.layers) if isinstance(own, RecurrentState)]
    paths = jax.tree_util.tree_leaves_with_path(jax.eval_shape(initial.norms, state))
    return [(kinds[at.idx], jax.tree_util.keystr(rest, simple=True)) for (at, *rest), _ in paths]
