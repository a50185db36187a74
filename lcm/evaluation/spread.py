"""Evaluation in several processes: one model over the devices of all, each batch by its rows.

Every process reads the same documents and hands over whole batches, of which its devices have their
part, and is given the losses of all: so each comes to the one result, and process 0 writes it.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcm import config, parallel
from lcm.evaluation.documents import Document
from lcm.parallel import hosts
from lcm.pretrained import Model, changed
from lcm.training import checkpoints, workdir
from lcm.types import Array, Batch

IN_ORDER = ("mesh.order=plain",)  # rows are as they were read, whatever a run was trained with


def mesh(source: str | pathlib.Path, overrides: Sequence[str], *given: Any) -> Mesh:
    """Over all devices: that of a run's config, the default one's for other models, or overrides'.

    given: what else must be the same for all processes.

    Raises:
        ConfigError: if it does not cover the devices, or processes were given different things.
        CheckpointError: if not all of them see the run.
    """
    hosts.check_same("command", json.dumps([str(source), *overrides, *map(str, given)]))
    own = [override for override in overrides if override.startswith("mesh.")]

    def made() -> Mesh:
        folder = pathlib.Path(source)
        cfg = workdir.read_config(folder) if checkpoints.steps(folder) else config.base()
        return parallel.make_reading(config.override(cfg, own))

    return hosts.by_all(made)


def over_mesh(model: Model, overrides: Sequence[str]) -> Model:
    """`changed` for a model that lies on a mesh.

    Raises:
        ConfigError: as there, and for ways of attention that cannot be spread so.
    """
    model = changed(model, [*overrides, *IN_ORDER])
    parallel.context.check(model.cfg, dict(parallel.of(model.params).shape))
    return model


def rows(params: Any) -> int:
    """What the rows of a batch are dealt out to: 1 for a model of one device."""
    on = parallel.of(params)
    return on.shape["data"] * on.shape["fsdp"] if on else 1


def losses(run: Callable[..., Array], params: Any, batch: Batch) -> Array:
    """`run(params, batch)`, float32 `[B, L]` and whole for all, of a batch that all have.

    run: compiled for the devices of the parameters by `compiled`.
    """
    on = parallel.of(params)
    shape = batch.tokens_BL.shape
    missing = -shape[0] % rows(params), -shape[1] % on.shape["context"]
    padded = jax.tree.map(lambda x: np.pad(x, [(0, count) for count in missing]), batch)
    with jax.set_mesh(on):
        return run(params, parallel.put(padded, on))[: shape[0], : shape[1]]


@functools.cache
def compiled(fn: Callable[..., Array], on: Mesh) -> Callable[..., Array]:
    """A function whose result every process has the whole of."""
    return jax.jit(fn, out_shardings=NamedSharding(on, PartitionSpec()))


def read_by_all(read: Callable[[], list[Document]]) -> list[Document]:
    """Documents that every process reads for itself; the error of one is that of all.

    Raises:
        ConfigError: if they are not the same everywhere.
    """
    documents = hosts.by_all(read)
    if jax.process_count() > 1:
        known = hashlib.sha256()
        for document in documents:
            known.update(document.tokens_N.tobytes() + document.targets_N.tobytes() + b"|")
        hosts.check_same("held-out text", known.hexdigest())
    return documents
