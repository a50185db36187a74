"""Train on short examples of a task, score longer ones: one run of a length-generalisation study."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lcm.data import tasks
from lcm.data.tasks import PackedRows, Task
from lcm.evaluation.exact_match import Place, points_over_seeds
from lcm.training.seeds import BatchAt, train_seeds
from lcm.training.workdir import write_text

RESULT = "accuracy.json"


def study(
    cfg: ConfigDict,
    folder: pathlib.Path,
    *,
    seeds: int,
    lengths: Sequence[int],
    count: int,
    title: str,
    place: Callable[[ConfigDict, bool], Place] | None = None,
) -> list[dict[str, Any]]:
    """Accuracy by length of a config over seeds; trained and scored once, then read from its file.

    The task is that of `data.source`, in its own words. `place(cfg, training)` gives a function
    that replaces positions. An interrupted run goes on from its newest checkpoint.

    Raises:
        UserError: for configs, tasks and workdirs that cannot be.
    """
    file = folder / RESULT
    if file.exists():
        return json.loads(file.read_text())["points"]
    task = tasks.make(cfg.data.source)
    at_training = place and place(cfg, True)
    batches = batches_of(task, cfg, at_training)
    params = train_seeds(cfg, folder, range(seeds), batches, title=title)
    at_test = place and place(cfg, False)
    points = points_over_seeds(cfg, params, seeds, task, lengths, count, place=at_test)
    write_text(file, json.dumps({"source": cfg.data.source, "points": points}, indent=1) + "\n")
    return points


def batches_of(task: Task, cfg: ConfigDict, place: Place | None = None) -> BatchAt:
    """Packed training batches by seed and step; each seed has examples of its own."""
    size = tasks.source_options(cfg.data.source)["size"]
    rows: dict[int, PackedRows] = {}

    def at(seed: int, step: int) -> Any:
        if seed not in rows:
            examples = task.draw(tasks.span(task.train), size, seed, "train")
            rows[seed] = PackedRows(examples, task.vocabulary, cfg.train.batch, cfg.data.length)
        batch = rows[seed](step)
        if place is None:
            return batch
        return batch._replace(context=place(batch.context, np.random.default_rng((seed, step))))

    return at


def row_length(task: Task, multiple: int = 32) -> int:
    """Tokens that a training row needs for the longest of many examples of a task, rounded up."""
    longest = [task.draw([n], 200, 0, "train") for n in _longest_lengths(task)]
    size = max(tasks.longest(list(examples), task.vocabulary) for examples in longest)
    return -(-size // multiple) * multiple


def _longest_lengths(task: Task) -> list[int]:
    """The three longest lengths trained on that there are."""
    there = [n for n in tasks.span(task.train) if task.cells(n) or task.pool([n], "train")]
    return there[-3:]


def one_seed(stacked: Any, index: int) -> Any:
    """The parameters of one seed out of those of all."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)
