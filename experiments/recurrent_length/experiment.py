"""Recurrent models made to run long: what they begin with in training, and what is done to them.

    lcm reproduce recurrent_length [--scale cpu|tiny]

Overwrite-recall streams, which have no natural length. Models are trained on short pieces from
empty states, then a little more with each start of Ruiz and Gu (2025, arXiv:2507.02782), all of one
budget; what needs no training is done to the first of them (arXiv:2410.07145v1, 2509.19633). All
are scored on streams of 32 times the length.
"""

import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lcm import config, report
from lcm.data.streams import OverwriteRecall
from lcm.evaluation import recall
from lcm.evaluation.remembrance import state_norms
from lcm.report.tables import Table
from lcm.training.carry import KINDS
from lcm.training.seeds import one_seed, train_seeds
from lcm.training.workdir import write_text
from lcm.types import Batch

SCALES = ("cpu", "tiny")
SOURCE = "lcm's own, 2 layers, K=32, T=64, 3000 steps, then 300"
STREAMS = 1 << 20  # apart from the seeds of training


class Scale(NamedTuple):
    """How large a run is: pieces of `length` tokens, `streams` of `times` as many to score."""

    mixers: tuple[str, ...]
    keys: int
    length: int
    times: int
    width: int
    heads: int
    state: int
    rows: int
    steps: int
    more: int
    streams: int


CPU = Scale(("mamba2", "gla", "gated_deltanet"), 16, 64, 32, 64, 4, 32, 16, 800, 100, 16)
TINY = Scale(("mamba2",), 4, 8, 4, 16, 2, 4, 4, 4, 2, 4)


def config_of(sizes: Scale, mixer: str, steps: int, *keys: str) -> ConfigDict:
    """A model without MLPs, and a rate of 3e-3 that falls in the last fifth."""
    shape = (
        *("model.depth=2", "model.mlp=none", f"model.pattern={mixer}", "model.expand=2"),
        *(f"model.width={sizes.width}", f"model.heads={sizes.heads}", f"model.state={sizes.state}"),
        *(f"model.vocab={3 * sizes.keys}", f"model.embed_scale={math.sqrt(sizes.width)}"),
        *(f"data.length={sizes.length}", f"train.batch={sizes.rows}", f"train.steps={steps}"),
        *("train.lr=3e-3", "train.schedule=wsd", "train.final_lr=0.17", "train.weight_decay=0"),
        *(f"train.warmup={min(50, steps // 2)}", "train.z_loss=0", f"checkpoint.every={steps}"),
        *("checkpoint.keep=1", "train.log_every=50"),
    )
    return config.override(config.base(), [*shape, *keys])


def begun(sizes: Scale, task: OverwriteRecall, mixer: str, folder: pathlib.Path) -> Any:
    """Parameters trained from empty states, stacked as of one seed."""

    def batch_at(seed: int, step: int) -> Batch:
        return task.batch(task.rows((seed, step), sizes.rows, sizes.length))

    cfg = config_of(sizes, mixer, sizes.steps)
    return train_seeds(cfg, folder / "begun", [0], batch_at, title=f"{mixer}, from nothing")


def gone_on(
    sizes: Scale, task: OverwriteRecall, mixer: str, kind: str, start: Any, folder: pathlib.Path
) -> Any:
    """Parameters after `more` steps with states that begin as `kind` says.

    `zero` is the control. Streams are new ones, in pieces one after another for `continued`.
    """
    streams = task.rows((0, STREAMS), sizes.rows, sizes.more * sizes.length)

    def batch_at(seed: int, step: int) -> Batch:
        if kind == "continued":
            return task.batch(streams[:, step * sizes.length : (step + 1) * sizes.length])
        return task.batch(task.rows((seed, STREAMS, step), sizes.rows, sizes.length))

    keys = "train.lr=5e-4", "train.schedule=constant", "train.warmup=0"
    cfg = config_of(sizes, mixer, sizes.more, *keys, f"train.initial_state={kind}")
    return train_seeds(cfg, folder / kind, [0], batch_at, start=start, title=f"{mixer}, {kind}")
