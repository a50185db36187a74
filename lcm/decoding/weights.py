"""Parameters as decoding wants them: layers apart, matrices in fewer bits if one likes.

    bfloat16    products of bfloat16 numbers, summed in float32
    int8        products of int8 numbers with a scale per column, and per row of activations

What is no matrix, such as norms and biases, stays as it is, and so does what encodings learn.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lcm.models import decoder
from lcm.nn.dense import Int8
from lcm.ops.int8 import quantised
from lcm.types import Array

WEIGHTS = ("", "float32", "bfloat16", "int8")
TABLES = ("embedding",)  # parameters whose rows, not columns, are multiplied


def laid_out(params: decoder.Params, weights: str = "", release: bool = False) -> decoder.Params:
    """Parameters with layers as lists, see `decoder.unstacked`, and matrices in a dtype.

    release: gives the memory of each parameter free once it is laid out, so that no more than one
        is there twice; `params` are of no use then.
    """

    def layers_of(path: tuple, stacked: Array) -> list[Any]:
        apart = decoder.unstacked(stacked)
        apart = apart if _of_positions(path) else [_matrix(x, weights) for x in apart]
        if release:
            jax.block_until_ready(apart)
            stacked.delete()
        return apart

    layers = {}
    for kind, own in params["layers"].items():
        leaves, shape = jax.tree_util.tree_flatten_with_path(own)
        columns = [layers_of(*leaf) for leaf in leaves]
        layers[kind] = [jax.tree.unflatten(shape, each) for each in zip(*columns, strict=True)]
    ends = {
        name: jax.tree.map(lambda x, name=name: _matrix(x, weights, int(name in TABLES)), own)
        for name, own in params.items()
        if name not in ("layers", "positions")
    }
    return {**params, **ends, "layers": layers}


def _of_positions(path: tuple) -> bool:
    return jax.tree_util.DictKey("positions") in path


def _matrix(x: Array, weights: str, axis: int = 0) -> Any:
    """A leaf in a dtype if it is a matrix, which multiplies over an axis."""
    if not weights or x.ndim != 2:
        return x
    if weights == "int8":
        q, scale = _quantised(x, axis)
        return Int8(q, scale.reshape(-1))
    return x.astype(jnp.dtype(weights))


_quantised = jax.jit(quantised, static_argnums=1)
