"""One step of training: loss, gradient, update, in one compiled function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lcm import parallel, positions
from lcm.models import ModelSpec, decoder
from lcm.nn.experts import imbalance, largest_share
from lcm.training import carry
from lcm.training.scores import scored
from lcm.types import Array, Batch

Metrics = dict[str, Array]
Step = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]


PLACEMENT, STATES = 1, 2  # apart from other uses of the seed


class TrainState(NamedTuple):
    """Everything that a step changes; `average` is None unless `train.ema` asks for one, and
    `carried`, what the next batch's recurrent states come from, unless `train.initial_state`."""

    step: Array
    params: Any
    opt_state: Any
    average: Any
    carried: Any = None


def init_state(
    spec: ModelSpec,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    ema: float,
    carried: Any = None,
) -> TrainState:
    """The state before the first step; `carried` is what `carry.init` gives."""
    params = decoder.init(spec, key)
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average, carried)


def make_step(spec: ModelSpec, optimizer: optax.GradientTransformation, cfg: Any) -> Step:
    """The step function of a config, not yet compiled.

    The loss is the mean of `nll + z_loss log_z^2` over the tokens of the whole batch by their
    weight, however many microbatches it is cut into; `balance` times the imbalance of experts is
    added, which of several microbatches is the mean of theirs, by weight as well. Batches have rows
    of `data.length` times the placement's span.
    """
    train, length = cfg.train, cfg.data.length
    placement = positions.make_placement(train.placement)
    draws = jax.random.fold_in(jax.random.key(cfg.seed), PLACEMENT)
    states = jax.random.fold_in(jax.random.key(cfg.seed), STATES)
    bins = min(train.position_bins, length)
    carry.check(spec, train)

    def loss(params: Any, given: tuple[Batch, Any]) -> tuple[Array, tuple[Metrics, Any]]:
        batch, start = given[0], carry.rows_first(given[1])
        context = carry.placed(spec, batch.context, start)
        read = params, batch.tokens_BL, context, start
        if spec.balance:
            x_BLD, after, load_R = decoder.hidden_and_load(spec, *read)
        else:
            x_BLD, after = decoder.hidden(spec, *read)
        after = None if after is None else carry.rows_first(carry.ended(after, context))
        weight_BL = batch.loss_weight_BL
        total, nll_BL = scored(spec, train.z_loss, params, x_BLD, batch.targets_BL, weight_BL)
        where_BL = jnp.minimum(batch.context.positions_BL * bins // length, bins - 1)
        sums = {
            "nll": (nll_BL * weight_BL).sum(),
            "weight": weight_BL.sum(),
            "nll_by_position": _by_bin(nll_BL * weight_BL, where_BL, bins),
            "weight_by_position": _by_bin(weight_BL, where_BL, bins),
        }
        if spec.balance:
            sums["imbalance"] = imbalance(load_R) * sums["weight"]
            sums["chosen_RE"] = load_R.chosen_E
            total += spec.balance * sums["imbalance"]
        return total, (sums, after)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = placement(jax.random.fold_in(draws, state.step), batch, length)
        batch = parallel.arranged(batch, cfg.mesh.order)
        key = jax.random.fold_in(states, state.step)
        start = carry.begin(spec, train, state.carried, state.step, key, batch.context)
        given = batch, carry.rows_first(start)
        gradient, (sums, after) = _accumulated(
            jax.grad(loss, has_aux=True), state.params, given, train
        )
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
        if spec.balance:
            metrics["imbalance"] = sums["imbalance"] / jnp.maximum(sums["weight"], 1.0)
            metrics["largest_share"] = largest_share(sums["chosen_RE"])
        carried = carry.kept(train, carry.rows_first(after))
        return TrainState(state.step + 1, params, opt_state, average, carried), metrics

    return step


def _accumulated(
    gradient: Callable, params: Any, given: tuple[Batch, Any], train: Any
) -> tuple[Any, tuple[Metrics, Any]]:
    """Sums of gradients and metrics over `train.accumulate` microbatches, and all rows' states."""
    parts = train.accumulate
    if parts == 1:
        return gradient(params, given)
    # Every parts-th row, so that a batch sharded over devices stays where it is.
    cut = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
    whole = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])  # noqa: E731
    micro = jax.tree.map(cut, given)
    first = jax.tree.map(lambda x: x[0], micro)
    like, (sums, _) = jax.eval_shape(gradient, params, first)
    zeros = jax.tree.map(jnp.zeros_like, (like, sums))

    def add(total: Any, part: tuple[Batch, Any]) -> tuple[Any, Any]:
        own, (sums, after) = gradient(params, part)
        return jax.tree.map(jnp.add, total, (own, sums)), after

    (total, sums), after = jax.lax.scan(add, zeros, micro)
    return total, (sums, jax.tree.map(whole, after))


def _by_bin(values_BL: Array, where_BL: Array, bins: int) -> Array:
    """Sums of values by bin of position, `[bins]`."""
    return jnp.zeros(bins, jnp.float32).at[where_BL].add(values_BL)
