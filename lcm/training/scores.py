"""The loss of tokens, made for some of them at a time where all their logits would be large."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lcm import parallel
from lcm.models import ModelSpec, decoder
from lcm.ops.losses import cross_entropy
from lcm.ops.placed import axes_in_use
from lcm.types import Array

# Numbers that a device holds at once, at the most: of logits, and of their gradient, which is of
# the dtype the model computes in.
LOGITS, HELD = 2**27, 2**30


class How(NamedTuple):
    """What is fixed when a step is traced: the model, `train.z_loss`, and how tokens are cut.

    cut: axes of the mesh that tokens lie on; groups: of a device's tokens; pieces: of a group.
    """

    spec: ModelSpec
    z_loss: float
    groups: int
    pieces: int
    cut: tuple[str, ...]


def scored(
    spec: ModelSpec, z_loss: float, params: Any, x_BLD: Array, targets_BL: Array, weight_BL: Array
) -> tuple[Array, Array]:
    """The sum of `weight (nll + z_loss log_z^2)`, and `nll` of each token, which has no gradient.

    Where the logits of a device would be large, they are made once, for some of its tokens at a
    time, and their gradient with them, since a sum of losses needs no more to be known: it is
    theirs times that of the sum. So they are never all there and nothing is made twice. The output
    matrix is gathered once for all pieces. Its gradient is one product for a group of them, since
    a sum in float32 over pieces would go through memory for each, and is summed over groups.
    """
    axes = axes_in_use()
    cut = tuple(axis for axis in ("data", "fsdp", "context") if axis in axes)
    shards = math.prod(axes[axis] for axis in cut)
    own = targets_BL.size // shards
    vocab = spec.vocab // axes.get("tensor", 1)
    if own * vocab <= LOGITS:
        total, nll_BL = _score(spec, z_loss, params, x_BLD, targets_BL, weight_BL)[:2]
        return total, jax.lax.stop_gradient(nll_BL)
    groups = _parts(own, HELD // vocab)
    pieces = _parts(own // groups, LOGITS // vocab)
    name = "embedding" if spec.tied else "head"
    output = {name: jax.tree.map(lambda x: x.astype(spec.dtype), params[name])}
    how = How(spec, z_loss, groups, pieces, cut if shards > 1 else ())
    return _in_pieces(how, output, x_BLD, targets_BL, weight_BL)


def _parts(tokens: int, most: int) -> int:
    """The least number of equal parts of at most so many tokens, or of one."""
    return next(n for n in range(1, tokens + 1) if tokens % n == 0 and tokens // n <= max(most, 1))


def _score(
    spec: ModelSpec, z_loss: float, output: Any, x_BLD: Array, targets_BL: Array, weight_BL: Array
) -> tuple[Array, Array, Array]:
    """The sum, `nll` and what `weight` is multiplied by."""
    nll_BL, _, cost_BL = _costs(z_loss, decoder.logits(spec, output, x_BLD), targets_BL)
    return (cost_BL * weight_BL).sum(), nll_BL, cost_BL


def _costs(z_loss: float, logits_BLV: Array, targets_BL: Array) -> tuple[Array, Array, Array]:
    """`nll`, `log_z`, and their sum as the loss has it."""
    nll_BL, log_z_BL = cross_entropy(logits_BLV, targets_BL)
    return nll_BL, log_z_BL, nll_BL + z_loss * log_z_BL**2 if z_loss else nll_BL


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_pieces(
    how: How, output: Any, x_BLD: Array, targets_BL: Array, weight_BL: Array
) -> tuple[Array, Array]:
    return _mapped(how, _plain, output, x_BLD, targets_BL, weight_BL)[:2]


def _forward(how: How, *given: Any) -> tuple[tuple[Array, Array], tuple]:
    total, nll_BL, cost_BL, d_x_BLD, d_output = _mapped(how, _with_gradient, *given)
    return (total, nll_BL), (d_output, d_x_BLD, cost_BL)


def _backward(how: How, kept: tuple, given: tuple[Array, Array]) -> tuple:
    d_total, _ = given
    d_output, d_x_BLD, d_weight_BL = jax.tree.map(lambda d: (d * d_total).astype(d.dtype), kept)
    return d_output, d_x_BLD, np.zeros(d_weight_BL.shape, jax.dtypes.float0), d_weight_BL


_in_pieces.defvjp(_forward, _backward)


def _mapped(how: How, run: Any, *given: Any) -> tuple:
    """`run` on each device's own tokens."""
    inside = partial(run, how)
    if not how.cut:
        return inside(*given)
    rows, whole = parallel.BATCH, PartitionSpec()
    results = whole, rows, rows, rows, whole
    return jax.shard_map(
        inside,
        in_specs=(whole, rows, rows, rows),
        out_specs=results if run is _with_gradient else results[:3],
        axis_names=set(how.cut),
        check_vma=False,
    )(*given)


def _plain(how: How, output: Any, *tokens: Array) -> tuple[Array, Array, Array]:
    score = partial(_score, how.spec, how.z_loss, output)
    pieces = _cut(how.groups * how.pieces, tokens)
    totals, nll, cost = jax.lax.map(lambda each: score(*each), pieces)
    shape = tokens[1].shape
    return _summed(how, totals.sum()), nll.reshape(shape), cost.reshape(shape)


def _with_gradient(how: How, output: Any, *tokens: Array) -> tuple:
    """Results of `_score`, the gradients of its sum for `x`, and for the output matrix."""
    x_BLD, targets_BL, _ = tokens

    def add(d_sum: Any, group: tuple[Array, ...]) -> tuple[Any, tuple]:
        *results, d_output = _scored_group(how, output, *group)
        d_sum = jax.tree.map(lambda total, own: total + own.astype(total.dtype), d_sum, d_output)
        return d_sum, tuple(results)

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), output)
    d_sum, (totals, nll, cost, d_x) = jax.lax.scan(add, zeros, _cut(how.groups, tokens))
    d_output = jax.tree.map(lambda d, w: _summed(how, d.astype(w.dtype)), d_sum, output)
    nll, cost = (each.reshape(targets_BL.shape) for each in (nll, cost))
    return _summed(how, totals.sum()), nll, cost, d_x.reshape(x_BLD.shape), d_output


def _scored_group(
    how: How, output: Any, x_BLD: Array, targets_BL: Array, weight_BL: Array
) -> tuple[Array, Array, Array, Array, Any]:
    """Results by piece, the gradient for `x`, and that for the output matrix."""
    pieces = _cut(how.pieces, (x_BLD, targets_BL, weight_BL))
    *results, d_scores = jax.lax.map(lambda each: _scored_piece(how, output, *each), pieces)
    pull = jax.linear_transpose(lambda w: decoder.scores(how.spec, w, x_BLD), output)
    d_scores = d_scores.reshape(*targets_BL.shape, -1)
    (d_output,) = pull(d_scores.astype(jnp.float32))
    return *results, d_output


def _scored_piece(
    how: How, output: Any, x_BLD: Array, targets_BL: Array, weight_BL: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """The gradient by logits is `weight ((1 + 2 z_loss log_z) softmax - onehot)`.

    It is rounded to the dtype the model computes in, as matrix units would, and written down: both
    products that read it would make it again.
    """
    spec, z_loss = how.spec, how.z_loss
    scores_BLV, pull = jax.vjp(lambda x: decoder.scores(spec, output, x), x_BLD)
    logits_BLV, uncapped = jax.vjp(partial(decoder.capped, spec), scores_BLV)
    nll_BL, log_z_BL, cost_BL = _costs(z_loss, logits_BLV, targets_BL)
    slope_BL = 1 + 2 * z_loss * log_z_BL if z_loss else jnp.ones_like(log_z_BL)
    softmax_BLV = jnp.exp(logits_BLV - log_z_BL[..., None])
    there_BLV = targets_BL[..., None] == jax.lax.broadcasted_iota(jnp.int32, logits_BLV.shape, 2)
    d_BLV = weight_BL[..., None] * (slope_BL[..., None] * softmax_BLV - there_BLV)
    (d_BLV,) = uncapped(d_BLV)
    d_BLV = jax.lax.optimization_barrier(d_BLV.astype(spec.dtype))
    (d_x_BLD,) = pull(d_BLV.astype(scores_BLV.dtype))
    return (cost_BL * weight_BL).sum(), nll_BL, cost_BL, d_x_BLD, d_BLV


def _cut(parts: int, tokens: tuple[Array, ...]) -> tuple[Array, ...]:
    """What is of tokens in parts, `[parts, 1, tokens, ...]`."""
    return tuple(each.reshape(parts, 1, -1, *each.shape[2:]) for each in tokens)


def _summed(how: How, x: Array) -> Array:
    return jax.lax.psum(x, how.cut) if how.cut else x
