"""The programs of a config for a mesh that need not be here: a train step, a prefill, a decode."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcm import models, parallel, positions, training
from lcm.aot.program import Program, compile
from lcm.models import decoder
from lcm.types import Batch, Context

# Tokens of a prompt that are read in one call, at the most.
CHUNK = 2048


class Built(NamedTuple):
    """A function with the shapes and places of its arguments, to be compiled.

    tokens: those of all devices that one run of it takes.
    options: of `jax.jit`.
    """

    fn: Callable
    args: tuple
    options: dict[str, Any]
    tokens: int

    def compiled(self, mesh: Mesh) -> Program:
        return compile(self.fn, *self.args, topology=mesh, **self.options)


def train(cfg: Any, mesh: Mesh) -> Built:
    """One step of training, as `lcm train` compiles it."""
    state = training.abstract_state(cfg, mesh)
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = training.make_step(models.spec(cfg), training.optimizer(cfg.train), cfg)
    span = positions.make_placement(cfg.train.placement).span
    rows, length = cfg.train.batch, cfg.data.length * span
    at, shape = parallel.batch_sharding(mesh), (rows, length)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=at)
    weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=at)
    batch = Batch(ids, ids, Context(ids, ids, ids), weights)
    options = {"donate_argnums": 0, "out_shardings": (layout, None)}
    return Built(step, (state, batch), options, rows * length)


def prefill(cfg: Any, mesh: Mesh) -> Built:
    """The first of `data.length` prompt tokens into empty caches, a row to each data shard."""
    return _serving(cfg, mesh, min(CHUNK, cfg.data.length), logits=False)


def decode(cfg: Any, mesh: Mesh) -> Built:
    """One token more of `train.batch` rows whose caches hold `data.length` tokens."""
    return _serving(cfg, mesh, 1, logits=True)


STEPS: dict[str, Callable[[Any, Mesh], Built]] = {
    "train": train,
    "prefill": prefill,
    "decode": decode,
}


def _serving(cfg: Any, mesh: Mesh, length: int, logits: bool) -> Built:
    spec = models.spec(cfg)
    rows = cfg.train.batch if length == 1 else mesh.shape["data"] * mesh.shape["fsdp"]

    def step(params: Any, state: Any, tokens_BL: Any, context: Context) -> tuple[Any, Any]:
        x_BLD, state = decoder.hidden(spec, params, tokens_BL, context, state)
        return (decoder.logits(spec, params, x_BLD) if logits else None), state

    shapes = decoder.shapes(spec)
    params = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, spec.dtype, sharding=at),
        shapes,
        parallel.shardings({"params": shapes}, mesh)["params"],
    )
    state = jax.eval_shape(lambda: decoder.init_state(spec, rows, cfg.data.length))
    state = jax.tree.map(lambda leaf: _cache(mesh, leaf, rows), state)
    at = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=at)
    return Built(
        step, (params, state, ids, Context(ids, ids, ids)), {"donate_argnums": 1}, rows * length
    )


def _cache(mesh: Mesh, leaf: Any, rows: int) -> Any:
    """State with its rows over data and fsdp, and heads, which follow them, over tensor.

    Rows are the axis behind that of layers, or the only one.
    """
    stacked, heads = leaf.ndim > 1, leaf.ndim > 3 and leaf.shape[2] % mesh.shape["tensor"] == 0
    axes = [None] * stacked + [("data", "fsdp")] + ["tensor"] * heads
    spec = PartitionSpec(*axes) if leaf.shape[stacked : stacked + 1] == (rows,) else PartitionSpec()
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
