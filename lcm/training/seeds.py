"""Several seeds of one config trained at once: their states stacked, one step vectorised over them.

Small models leave a machine idle; S of them side by side take little longer than one. Data come
from a function of seed and step, so that a resumed run goes on where it was. One compilation
serves all runs of equal shapes, whatever their data.
"""

import functools
import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lcm import config, models, positions
from lcm.errors import TrainingError
from lcm.models import ModelSpec
from lcm.progress import progress
from lcm.training import carry, checkpoints, workdir
from lcm.training.metrics import Metrics
from lcm.training.optimizers import optimizer
from lcm.training.step import PLACEMENT, TrainState, init_state, make_step
from lcm.types import Batch

_log = logging.getLogger(__name__)

BatchAt = Callable[[int, int], Batch]  # of a seed and a step, as numpy arrays


def train_seeds(
    cfg: ConfigDict,
    folder: pathlib.Path,
    seeds: Sequence[int],
    batch_at: BatchAt,
    *,
    start: Any = None,
    title: str = "train",
) -> Any:
    """Parameters after `train.steps`, each leaf `[S, ...]`; from the newest checkpoint if any.

    `start` are stacked parameters to begin with, to which fresh ones are added where the model has
    more; otherwise all are fresh. Placements are drawn for each seed apart.

    Raises:
        UserError: for configs and workdirs as `lcm.training.train`; TrainingError for a loss that
            is not a number.
    """
    config.check_keys(cfg)
    with ExitStack() as stack:
        stack.enter_context(workdir.owned(folder))
        workdir.write_config(folder, cfg)
        state, at = _begin(cfg, folder, seeds, start)
        if at == cfg.train.steps:
            return state.params
        metrics = Metrics(folder, at)
        stack.callback(metrics.close)
        writer = checkpoints.Writer(folder, cfg.checkpoint.keep)
        stack.callback(writer.close)
        step, draws = _compiled(models.spec(cfg), _key(cfg)), _keys(seeds, PLACEMENT)
        report = stack.enter_context(progress(title))
        while at < cfg.train.steps:
            batches = [batch_at(seed, at) for seed in seeds]
            state, values = step(state, jax.tree.map(lambda *x: np.stack(x), *batches), draws)
            at += 1
            if at % cfg.train.log_every == 0 or at in (1, cfg.train.steps):
                text = _write(metrics, at, seeds, jax.device_get(values))
                tokens = len(seeds) * cfg.train.batch * cfg.data.length
                text = f"step {at}/{cfg.train.steps} {text}"
                report(at * tokens, cfg.train.steps * tokens, text)
            if at % cfg.checkpoint.every == 0 or at == cfg.train.steps:
                _save(writer, cfg, state, at)
        writer.finish()
        return state.params


def one_seed(params: Any, index: int) -> Any:
    """The parameters of one seed out of those of all."""
    return jax.tree.map(lambda leaf: leaf[index], params)


def _keys(seeds: Sequence[int], *purpose: int) -> jax.Array:
    """A key for each seed, apart from other uses of it."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return functools.reduce(
        lambda k, p: jax.vmap(lambda key: jax.random.fold_in(key, p))(k), purpose, keys
    )


def _begin(
    cfg: ConfigDict, folder: pathlib.Path, seeds: Sequence[int], start: Any
) -> tuple[TrainState, int]:
    """The stacked state of the newest checkpoint, or a first one, and the step it is of."""
    spec, rule = models.spec(cfg), optimizer(cfg.train)
    keys = _keys(seeds)
    carried = carry.init(spec, cfg.train)
    begin = jax.vmap(lambda key: init_state(spec, rule, key, cfg.train.ema, carried))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        _shared_step(jax.eval_shape(begin, keys)),
    )
    restored = checkpoints.restore(folder, like)
    if restored is None:
        state = jax.jit(begin)(keys)
        if start is not None:
            adopted = jax.vmap(lambda params, key: models.adopt(cfg, params, key))(start, keys)
            state = state._replace(params=models.only_used(cfg, adopted))
        # Copies, since a step takes the arrays it is given, and of the type that a step gives: a
        # number that an encoding begins with is of a weak one, and would be compiled for twice.
        return jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype), state), 0
    _log.info("resumed %s at step %d", folder, restored.step)
    steps = jnp.full(len(seeds), restored.step, jnp.int32)
    return restored.state._replace(step=steps), restored.step


def _shared_step(state: TrainState) -> TrainState:
    """The state with the one step that all seeds are at, as a checkpoint holds it."""
    if isinstance(state.step, jax.ShapeDtypeStruct):
        return state._replace(step=jax.ShapeDtypeStruct((), state.step.dtype))
    return state._replace(step=state.step[0])


def _save(writer: checkpoints.Writer, cfg: ConfigDict, state: TrainState, at: int) -> None:
    if not np.isfinite(np.sum([jnp.sum(leaf) for leaf in jax.tree.leaves(state.params)])):
        raise TrainingError(
            f"parameters are not finite at step {at}; the last checkpoint is kept: lower train.lr "
            "or set train.clip, and run again"
        )
    writer.save(_shared_step(state), {"step": at}, workdir.to_dict(cfg))


def _write(metrics: Metrics, at: int, seeds: Sequence[int], values: Any) -> str:
    """A line of metrics; the words for the progress bar."""
    loss = float(np.mean(values["loss"]))
    by_seed = {f"loss_{seed}": float(x) for seed, x in zip(seeds, values["loss"], strict=True)}
    metrics.write(at, {"loss": loss, **by_seed})
    return f"loss {loss:.4f}"


def _key(cfg: ConfigDict) -> str:
    """What a step depends on besides the model."""
    return json.dumps([cfg.train.to_dict(), cfg.data.length], sort_keys=True)


@functools.cache
def _compiled(spec: ModelSpec, key: str) -> Callable[[TrainState, Batch, jax.Array], Any]:
    train, length = json.loads(key)
    placement = positions.make_placement(train["placement"])
    train["placement"] = positions.placement_config("plain")  # the step's has one seed for all
    mesh = {"order": "plain"}  # all seeds are on one device
    cfg = ConfigDict({"train": train, "data": {"length": length}, "mesh": mesh, "seed": 0})
    step = make_step(spec, optimizer(cfg.train), cfg)

    def one(state: TrainState, batch: Batch, draws: jax.Array) -> tuple[TrainState, Any]:
        return step(state, placement(jax.random.fold_in(draws, state.step), batch, length))

    return jax.jit(_over_seeds(one), donate_argnums=0)


def _over_seeds(one: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one seed over all of them; of one alone it is not vectorised.

    XLA's YNNPACK fusions for the CPU (jax 0.10.2) end in a segmentation fault where they sum over
    and broadcast an array that begins with an axis of one, as a chunk of GLA would with it.
    """

    def many(*stacked: Any) -> Any:
        if len(jax.tree.leaves(stacked)[0]) > 1:
            return jax.vmap(one)(*stacked)
        return jax.tree.map(lambda x: x[None], one(*jax.tree.map(lambda x: x[0], stacked)))

    return many
