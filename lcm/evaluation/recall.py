"""Answers at many places of a stream: how many are right, by how far into it they are asked."""

import itertools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm import models
from lcm.errors import UserError
from lcm.models import State, initial
from lcm.training.seeds import BatchAt, one_seed, train_seeds
from lcm.training.workdir import write_text
from lcm.types import Array, Batch, Context


def training(width: int, heads: int, vocab: int, length: int, rows: int, steps: int) -> list[str]:
    """Assignments to a config that the experiments on recall share, beside their kinds of layers.

    Two layers, trained on rows of `length` tokens by Adam at 3e-3, which falls in the last fifth
    of the steps; one checkpoint at the end.
    """
    return [
        *("model.depth=2", f"model.width={width}", f"model.heads={heads}"),
        *(f"model.vocab={vocab}", f"model.embed_scale={math.sqrt(width)}"),
        *(f"data.length={length}", f"train.batch={rows}", f"train.steps={steps}"),
        *("train.lr=3e-3", "train.schedule=wsd", "train.final_lr=0.17", "train.weight_decay=0"),
        *(f"train.warmup={min(50, steps // 2)}", "train.z_loss=0", "train.log_every=50"),
        *(f"checkpoint.every={steps}", "checkpoint.keep=1"),
    ]


def studied(
    cfg: Any,
    folder: pathlib.Path,
    seeds: int,
    batch_at: BatchAt,
    score: Callable[[Any], dict[str, Any]],
) -> list[dict[str, Any]]:
    """What `score` finds of the parameters of each seed, trained at once; what is there is read."""
    file = folder / "scores.json"
    if file.exists():
        return json.loads(file.read_text())
    stacked = train_seeds(cfg, folder, range(seeds), batch_at, title=folder.name)
    found = [score(one_seed(stacked, seed)) for seed in range(seeds)]
    write_text(file, json.dumps(found, indent=1) + "\n")
    return found


def bands(length: int, longest: int) -> list[tuple[int, int]]:
    """Places `[0, T)`, `[T, 2 T)`, `[2 T, 4 T)` ... up to `longest`.

    Raises:
        UserError: for a longest that is no power of two times the length.
    """
    times = longest // max(length, 1)
    if length < 1 or longest % length or times & (times - 1):
        raise UserError(
            f"longest {longest} is no power of two times {length}: take {length * 2**5}"
        )
    edges = [0, *(length * 2**n for n in range(times.bit_length()))]
    return list(itertools.pairwise(edges))


def band_names(length: int, longest: int) -> list[str]:
    """What tables call the `bands`: `T`, `1-2 T`, `2-4 T` and so on."""
    spans = bands(length, longest)
    return ["T", *(f"{a // length}-{b // length} T" for a, b in spans[1:])]


def by_band(right_BL: Array, asked_BL: Array, spans: Sequence[tuple[int, int]]) -> list[float]:
    """The share of answers that is right in each span of places; nan where nothing is asked."""
    right_BL, asked_BL = np.asarray(right_BL), np.asarray(asked_BL)
    counts = [(right_BL[:, a:b].sum(), asked_BL[:, a:b].sum()) for a, b in spans]
    return [float(right / asked) if asked else float("nan") for right, asked in counts]


def kept(cfg: Any) -> tuple[int, int]:
    """Numbers that all layers of a recurrent model keep of a row: their states, and what their
    short convolutions look back at."""
    layers = models.init_state(cfg, 1, 1).layers
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    return count([one.memory for one in layers]), count([one.tails for one in layers])


def answered(cfg: Any, params: Any, batch: Batch, *, rows: int = 8) -> tuple[np.ndarray, ...]:
    """Which answers the model has right, and which places ask for one, bool `[B, L]`.

    Rows are read from an empty state, some at a time.
    """
    spec, found = models.spec(cfg), []
    for n in range(0, len(batch.tokens_BL), rows):
        part = jax.tree.map(lambda x, n=n: x[n : n + rows], batch)
        found.append(np.asarray(_right(spec, params, part)))
    asked_BL = np.asarray(batch.loss_weight_BL) > 0
    return np.concatenate(found) & asked_BL, asked_BL


@partial(jax.jit, static_argnums=0)
def _right(spec: models.ModelSpec, params: Any, batch: Batch) -> Array:
    logits, _ = models.decoder.apply(spec, params, batch.tokens_BL, batch.context, None)
    return logits.argmax(-1) == batch.targets_BL


def answered_within(
    cfg: Any, params: Any, batch: Batch, most: Any, every: int
) -> tuple[np.ndarray, ...]:
    """Those of `answered` with states held in bounds after each `every` tokens.

    most: norms that none of the states passes, a tree as `initial.norms` gives it or one that
        broadcasts with it (Stuffed Mamba's normalisation, arXiv:2410.07145v1, 4.2).

    Raises:
        UserError: for tokens that `every` does not divide.
    """
    count, length = batch.tokens_BL.shape
    if every < 1 or length % every:
        raise UserError(f"every={every} does not divide {length} tokens: take a divisor of them")
    spec, state, found = models.spec(cfg), models.init_state(cfg, count, length), []
    for n in range(0, length, every):
        part = jax.tree.map(lambda x, n=n: x[:, n : n + every], batch)
        right_BC, state = _bounded(spec, params, part, state, most)
        found.append(np.asarray(right_BC))
    asked_BL = np.asarray(batch.loss_weight_BL) > 0
    return np.concatenate(found, 1) & asked_BL, asked_BL


@partial(jax.jit, static_argnums=0)
def _bounded(
    spec: models.ModelSpec, params: Any, batch: Batch, state: State, most: Any
) -> tuple[Array, State]:
    logits, state = models.decoder.apply(spec, params, batch.tokens_BL, batch.context, state)
    return logits.argmax(-1) == batch.targets_BL, initial.normalised(state, most)


def usual_norms(cfg: Any, params: Any, batch: Batch) -> Any:
    """The largest norm of each head's state after rows that are as long as those trained on: a tree
    that broadcasts with that of `initial.norms`."""
    tokens_BL, context = batch.tokens_BL, Context(*map(jnp.asarray, batch.context[:3]))
    empty = models.init_state(cfg, *tokens_BL.shape)
    _, state = models.apply(cfg, params, tokens_BL, context, empty)
    return jax.tree.map(lambda norm: norm.max(1, keepdims=True), initial.norms(state))
