"""One step of training: loss, gradient, update, in one compiled function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lcm import parallel, positions
from lcm.models import ModelSpec, decoder
from lcm.ops.losses import cross_entropy
from lcm.types import Array, Batch

Metrics = dict[str, Array]
Step = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]


PLACEMENT = 1  # apart from other uses of the seed


class TrainState(NamedTuple):
    """Everything that a step changes; `average` is None unless `train.ema` asks for one."""

    step: Array
    params: Any
    opt_state: Any
    average: Any


def init_state(
    spec: ModelSpec, optimizer: optax.GradientTransformation, key: jax.Array, ema: float
) -> TrainState:
    """The state before the first step."""
    params = decoder.init(spec, key)
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def make_step(spec: ModelSpec, optimizer: optax.GradientTransformation, cfg: Any) -> Step:
    """The step function of a config, not yet compiled.

    The loss is the mean of `nll + z_loss log_z^2` over the tokens of the whole batch by their
    weight, however many microbatches it is cut into. Batches have rows of `data.length` times the
    placement's span.
    """
    train, length = cfg.train, cfg.data.length
    placement = positions.make_placement(train.placement)
    draws = jax.random.fold_in(jax.random.key(cfg.seed), PLACEMENT)
    bins = min(train.position_bins, length)

    def loss(params: Any, batch: Batch) -> tuple[Array, Metrics]:
        logits, _ = decoder.apply(spec, params, batch.tokens_BL, batch.context, None)
        nll_BL, log_z_BL = cross_entropy(logits, batch.targets_BL)
        weight_BL = batch.loss_weight_BL
        where_BL = jnp.minimum(batch.context.positions_BL * bins // length, bins - 1)
        sums = {
            "nll": (nll_BL * weight_BL).sum(),
            "weight": weight_BL.sum(),
            "nll_by_position": _by_bin(nll_BL * weight_BL, where_BL, bins),
            "weight_by_position": _by_bin(weight_BL, where_BL, bins),
        }
        return sums["nll"] + train.z_loss * (log_z_BL**2 * weight_BL).sum(), sums

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = placement(jax.random.fold_in(draws, state.step), batch, length)
        batch = parallel.arranged(batch, cfg.mesh.order)
        gradient, sums = _accumulated(jax.grad(loss, has_aux=True), state.params, batch, train)
        gradient = jax.tree.map(lambda g: g / jnp.maximum(sums["weight"], 1.0), gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = decoder.project(spec, optax.apply_updates(state.params, updates))
        average = state.average
        if train.ema:
            average = optax.incremental_update(params, average, 1 - train.ema)
        by_position = sums["nll_by_position"] / sums["weight_by_position"]
        metrics = {
            "loss": sums["nll"] / jnp.maximum(sums["weight"], 1.0),
            "tokens": sums["weight"],
            "grad_norm": optax.tree.norm(gradient),
            "loss_by_position": by_position,
        }
        return TrainState(state.step + 1, params, opt_state, average), metrics

    return step


def _accumulated(gradient: Callable, params: Any, batch: Batch, train: Any) -> tuple[Any, Metrics]:
    """Sums of gradients and metrics over `train.accumulate` microbatches."""
    parts = train.accumulate
    if parts == 1:
        return gradient(params, batch)
    # Every parts-th row, so that a batch sharded over devices stays where it is.
    cut = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
    micro = jax.tree.map(cut, batch)
    first = jax.tree.map(lambda x: x[0], micro)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, first))

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    return jax.lax.scan(add, zeros, micro)[0]


def _by_bin(values_BL: Array, where_BL: Array, bins: int) -> Array:
    """Sums of values by bin of position, `[bins]`."""
    return jnp.zeros(bins, jnp.float32).at[where_BL].add(values_BL)
