"""One step of training: loss, gradient, update, in one compiled function."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from lcm import parallel, positions
from lcm.models import ModelSpec, decoder
from lcm.ops.losses import cross_entropy
from lcm.ops.placed import axes_in_use
from lcm.types import Array, Batch

Metrics = dict[str, Array]
Step = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]


LOGITS = 2**27  # numbers of logits that a device holds at once, at the most
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
        x_BLD, _ = decoder.hidden(spec, params, batch.tokens_BL, batch.context, None)
        nll_BL, log_z_BL = _scored(spec, params, x_BLD, batch.targets_BL)
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


def _scored(spec: ModelSpec, params: Any, x_BLD: Array, targets_BL: Array) -> tuple[Array, Array]:
    """Negative log-likelihood and log-normaliser of each token.

    Where the logits of a device would be large they are made for some of its tokens at a time, and
    once more for their gradient, so that they are never all there. The output matrix is gathered
    once for all pieces, and so is its gradient summed.
    """
    axes = axes_in_use()
    cut = [axis for axis in ("data", "fsdp", "context") if axis in axes]
    shards = math.prod(axes[axis] for axis in cut)
    own = targets_BL.size // shards
    pieces = -(-own * spec.vocab // (LOGITS * axes.get("tensor", 1)))
    if pieces == 1:
        return _score(spec, params, x_BLD, targets_BL)
    pieces = next(n for n in range(min(pieces, own), own + 1) if own % n == 0)
    name = "embedding" if spec.tied else "head"
    output = {name: jax.tree.map(lambda x: x.astype(spec.dtype), params[name])}
    inside = partial(_in_pieces, spec, pieces)
    if shards == 1:
        return inside(output, x_BLD, targets_BL)
    return jax.shard_map(
        inside,
        in_specs=(PartitionSpec(), parallel.BATCH, parallel.BATCH),
        out_specs=(parallel.BATCH, parallel.BATCH),
        axis_names=set(cut),
        check_vma=False,
    )(output, x_BLD, targets_BL)


def _in_pieces(
    spec: ModelSpec, pieces: int, output: Any, x_BLD: Array, targets_BL: Array
) -> tuple[Array, Array]:
    """`_score` of some tokens after others, each computed again for its gradient."""
    score = jax.checkpoint(partial(_score, spec, output))
    xs = x_BLD.reshape(pieces, 1, -1, spec.width), targets_BL.reshape(pieces, 1, -1)
    return jax.tree.map(lambda s: s.reshape(targets_BL.shape), jax.lax.map(lambda x: score(*x), xs))


def _score(spec: ModelSpec, output: Any, x_BLD: Array, targets_BL: Array) -> tuple[Array, Array]:
    return cross_entropy(decoder.logits(spec, output, x_BLD), targets_BL)


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
