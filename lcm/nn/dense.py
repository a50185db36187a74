"""Matrices, their application to the last axis, and their initialisation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.ops.platform import platform
from lcm.types import Array

INT8 = 127  # largest number of a symmetric int8


def dense(x: Array, w_DF: Any) -> Array:
    """`x @ w` with the leading axes of `x` merged, in the dtype of `x`.

    The gradient of a matmul with two leading axes runs at half the speed on a CPU.
    """
    rows = product(x.reshape(-1, x.shape[-1]), w_DF, x.dtype)
    return rows.reshape(*x.shape[:-1], w_DF.shape[1])


def product(x_ND: Array, w_DF: Any, dtype: jnp.dtype) -> Array:
    """`x @ w` in `dtype`, multiplied in the narrower of the two dtypes."""
    if isinstance(w_DF, Int8):
        return w_DF.product(x_ND).astype(dtype)
    if w_DF.dtype.itemsize >= x_ND.dtype.itemsize:
        w_DF = w_DF.astype(x_ND.dtype)
    else:
        x_ND = x_ND.astype(w_DF.dtype)
    return _matmul(x_ND, w_DF, dtype)


def _matmul(x_ND: Array, w_DF: Array, dtype: jnp.dtype) -> Array:
    count = x_ND.shape[0]
    # XLA has no product of a matrix and one vector for narrow types on a CPU: it widens the matrix.
    if count == 1 and w_DF.dtype.itemsize < 4 and platform() == "cpu":
        x_ND = jax.lax.optimization_barrier(jnp.pad(x_ND, ((0, 1), (0, 0))))
    return jnp.matmul(x_ND, w_DF, preferred_element_type=dtype)[:count]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A matrix of int8 numbers, `q[d, f] scale[f]`, to within half a scale; for inference.

    It multiplies rows of int8 numbers too, and sums in int32: each row of activations, with a scale
    of its own (the vector-wise scales of LLM.int8, arXiv:2208.07339), becomes two, one of its
    leading digits and one of what they leave, since activations have outliers that a single digit
    cannot hold beside the rest.
    """

    q_DF: Array
    scale_F: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q_DF.shape

    def __getitem__(self, _: Any) -> "Int8":
        """Itself, as a parameter is asked for its array."""
        return self

    def product(self, x_ND: Array) -> Array:
        """`x @ w`, float32."""
        high_ND, scale_N1 = quantised(x_ND, 1)
        rest_ND = x_ND.astype(jnp.float32) / jnp.where(scale_N1 > 0, scale_N1, 1.0) - high_ND
        low_ND = jnp.round(rest_ND * (2 * INT8)).astype(jnp.int8)  # the rest is within a half
        both = _matmul(jnp.concatenate([high_ND, low_ND]), self.q_DF, jnp.int32)
        high_NF, low_NF = jnp.split(both.astype(jnp.float32), 2)
        return (high_NF + low_NF / (2 * INT8)) * scale_N1 * self.scale_F


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Table:
    """A table of vectors in int8, `q[v, d] scale[v]`; transposed it is a matrix."""

    q_VD: Array
    scale_V: Array

    def __getitem__(self, index: Any) -> Any:
        """Rows in float32, or itself as a parameter is asked for its array."""
        if index is Ellipsis:
            return self
        return self.q_VD[index].astype(jnp.float32) * self.scale_V[index][..., None]

    @property
    def T(self) -> Int8:  # noqa: N802, as of an array
        return Int8(self.q_VD.T, self.scale_V)


def quantised(x: Array, axis: int) -> tuple[Array, Array]:
    """int8 and float32 scales, one for each place off the axis, kept as an axis of size 1."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(axis, keepdims=True) / INT8
    return jnp.round(wide / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8), scale


def matrix(rngs: nnx.Rngs, fan_in: int, fan_out: int, *, depth: int | None = None) -> nnx.Param:
    """A matrix that keeps the variance of its input: truncated normal, std 1/sqrt(fan_in).

    Give `depth` for the two matrices of a layer that write to the residual stream: their std is
    divided by sqrt(2 depth), so the stream has the same size at any depth (GPT-2, section 2.3).
    """
    std = (fan_in * (2 * depth if depth else 1)) ** -0.5
    init = jax.nn.initializers.truncated_normal(std / 0.87962566103423978)
    return nnx.Param(init(rngs.params(), (fan_in, fan_out), jnp.float32))
