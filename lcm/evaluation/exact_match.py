"""Exact match of greedy answers by length, from one forward pass.

Greedy decoding gives the target if and only if every token of it is the most likely one after the
tokens before it: up to its first mistake, a decoder reads what teacher forcing has it read.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm import models
from lcm.data import tasks
from lcm.data.tasks import Example, Task
from lcm.data.tokenizers import Tokenizer
from lcm.evaluation.statistics import Interval, wilson
from lcm.models import ModelSpec, decoder
from lcm.positions import Placement
from lcm.types import Array, Batch

PLAIN = Placement()
ROWS = 64  # in a call of the model
_MULTIPLE = 32  # of tokens in a row, so that neighbouring lengths share a compilation


def exact_match(
    cfg: Any,
    params: Any,
    task: Task,
    lengths: Sequence[int],
    count: int,
    *,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    placement: Placement = PLAIN,
) -> dict[int, Interval]:
    """Share of `count` test examples of each length answered exactly, with 95 % Wilson intervals.

    An answer with a scratchpad must match as a whole. Rows are padded to a multiple of 32, which
    an encoding that depends on the length of a row would see. `placement` says where tokens stand,
    such as at random places; `tokenizer` is the task's own by default.

    Raises:
        ConfigError: if the encoding has no place for these lengths.
        DataError: if the task has no examples of a length.
    """
    tokenizer = tokenizer or task.vocabulary
    scores = {}
    for length in lengths:
        examples = list(task.draw([length], count, seed, "test"))
        right = matches(cfg, params, examples, tokenizer, placement, seed)
        scores[length] = wilson(int(right.sum()), len(right))
    return scores


def matches(
    cfg: Any,
    params: Any,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    placement: Placement = PLAIN,
    seed: int = 0,
) -> np.ndarray:
    """Which examples greedy decoding answers with their very target, bool `[N]`."""
    spec, size = models.spec(cfg), tasks.longest(examples, tokenizer)
    models.check_limit(spec, size)
    length, key = -(-size // _MULTIPLE) * _MULTIPLE, jax.random.key(seed)
    right = []
    for start in range(0, len(examples), ROWS):
        some = examples[start : start + ROWS]
        full = [*some, *[some[0]] * (ROWS - len(some))]  # one shape for all calls
        batch = tasks.batch(full, tokenizer, length)
        batch = placement(jax.random.fold_in(key, start), batch, length)
        right.append(np.asarray(_all_right(spec, params, batch))[: len(some)])
    return np.concatenate(right)


@jax.jit(static_argnums=0)
def _all_right(spec: ModelSpec, params: Any, batch: Batch) -> Array:
    logits, _ = decoder.apply(spec, params, batch.tokens_BL, batch.context, None)
    same_BL = jnp.argmax(logits, axis=-1) == batch.targets_BL
    return jnp.all(same_BL | (batch.loss_weight_BL == 0), axis=-1)


def points_over_seeds(
    cfg: Any,
    stacked: Any,
    seeds: int,
    task: Task,
    lengths: Sequence[int],
    count: int,
    *,
    placement: Placement = PLAIN,
) -> list[dict[str, Any]]:
    """Accuracy by length of models whose parameters are stacked, as plain JSON.

    `value`, `low`, `high`: of the answers of all seeds together, with a Wilson interval that knows
    nothing of how seeds differ; `by_seed` shows that. All seeds answer the same examples.
    """
    points = []
    for length in lengths:
        examples = list(task.draw([length], count, 0, "test"))
        by_seed = [
            matches(
                cfg,
                jax.tree.map(lambda x, s=s: x[s], stacked),
                examples,
                task.vocabulary,
                placement,
            )
            for s in range(seeds)
        ]
        together = wilson(int(np.sum(by_seed)), seeds * len(examples))
        each = [float(right.mean()) for right in by_seed]
        points.append({"length": length, **together._asdict(), "by_seed": each})
    return points
