"""Matrices, their application to the last axis, and their initialisation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.ops.int8 import MOST, quantised
from lcm.ops.placed import placed
from lcm.ops.platform import platform
from lcm.types import Array


def dense(x: Array, w_DF: Any) -> Array:
    """`x @ w` in the dtype of `x`.

    With the leading axes of `x` merged but on a TPU: on a CPU the gradient of a matmul with two of
    them runs at half the speed, and a TPU keeps rows apart, tokens last, so that it would copy.
    """
    if _as_it_lies(w_DF):
        return product(x, w_DF, x.dtype)
    rows = product(x.reshape(-1, x.shape[-1]), w_DF, x.dtype)
    return rows.reshape(*x.shape[:-1], w_DF.shape[1])


def to_heads(x_BLD: Array, w_DE: Any, size: int) -> Array:
    """`dense` with its result cut into heads, `[B, L, H, K]`.

    On a TPU the matrix is cut instead: the layouts of the two results differ.
    """
    if _as_it_lies(w_DE):
        return product(x_BLD, w_DE.reshape(w_DE.shape[0], -1, size), x_BLD.dtype)
    return dense(x_BLD, w_DE).reshape(*x_BLD.shape[:-1], -1, size)


def from_heads(x_BLHK: Array, w_ED: Any) -> Array:
    """`dense` of heads side by side, which on a TPU are not put there, likewise."""
    if _as_it_lies(w_ED):
        w_HKD = w_ED.reshape(*x_BLHK.shape[2:], -1)
        return product(x_BLHK, w_HKD, x_BLHK.dtype, over=2)
    return dense(x_BLHK.reshape(*x_BLHK.shape[:2], -1), w_ED)


def _as_it_lies(w: Any) -> bool:
    """Whether a product takes arrays of several axes, which a TPU would copy to merge them."""
    return platform() == "tpu" and not isinstance(w, Int8)


def whole(w: Any, x: Array, *names: str) -> Any:
    """A matrix that `x` is to be multiplied by, gathered over all axes of the mesh but `tensor`.

    Its logical axes are those of `lcm.ops.placed`. Without this, XLA may gather a matrix twice for
    a backward pass that computes the forward pass again: by heads for it, and as it is for its
    gradient.
    """
    if isinstance(w, Int8):
        return w
    return placed(w.astype(min(w.dtype, x.dtype, key=lambda dtype: dtype.itemsize)), *names)


def product(x_ND: Array, w_DF: Any, dtype: jnp.dtype, over: int = 1) -> Array:
    """`x @ w` in `dtype`, multiplied in the narrower of the two dtypes.

    Where `w` is no `Int8` both may have more axes: the last ones of `x`, `over` of them, meet the
    first ones of `w`.
    """
    return _product(x_ND, w_DF, dtype, tuple(range(over)))


def product_with_rows(x_ND: Array, w_FD: Any, dtype: jnp.dtype) -> Array:
    """`x @ w.T`, as `product`; a narrow `w.T` would be widened by XLA on a CPU."""
    return _product(x_ND, w_FD, dtype, (1,))


def _product(x_ND: Array, w: Any, dtype: jnp.dtype, axes: tuple[int, ...]) -> Array:
    if isinstance(w, Int8):
        return w.product(x_ND, *axes).astype(dtype)
    if w.dtype.itemsize >= x_ND.dtype.itemsize:
        w = w.astype(x_ND.dtype)
    else:
        x_ND = x_ND.astype(w.dtype)
    return _matmul(x_ND, w, dtype, axes)


def _matmul(x_ND: Array, w: Array, dtype: jnp.dtype, axes: tuple[int, ...]) -> Array:
    """The product over axes of the matrix and the last ones of the other factor."""
    count = x_ND.shape[0]
    # XLA on a CPU has no narrow product of a matrix and one vector: it would widen the matrix.
    if count == 1 and w.dtype.itemsize < 4 and platform() == "cpu":
        more = ((0, 1), *((0, 0),) * (x_ND.ndim - 1))
        x_ND = jax.lax.optimization_barrier(jnp.pad(x_ND, more))
    last = tuple(range(x_ND.ndim - len(axes), x_ND.ndim))
    over = ((last, axes), ((), ()))
    return jax.lax.dot_general(x_ND, w, over, preferred_element_type=dtype)[:count]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A matrix or a table of int8 numbers with a scale for each output; for inference.

    It multiplies rows of int8 numbers too, and sums in int32: each row of activations, with a scale
    of its own (the vector-wise scales of LLM.int8, arXiv:2208.07339), becomes two, one of its
    leading digits and one of what they leave, since activations have outliers that a single digit
    cannot hold beside the rest.

    q: int8 `[D, F]`, or `[F, D]` of a table, whose rows may be looked up.
    scale_F: float32; numbers are within half a scale of what they were.
    """

    q: Array
    scale_F: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    @property
    def wide(self) -> Array:
        """The matrix that it stands for, float32."""
        return self.q.astype(jnp.float32) * self.scale_F

    def __getitem__(self, index: Any) -> Any:
        """Rows of a table in float32; itself, where a parameter is asked for its array."""
        if index is Ellipsis:
            return self
        return self.q[index].astype(jnp.float32) * self.scale_F[index][..., None]

    def product(self, x_ND: Array, axis: int) -> Array:
        """The product over an axis, float32."""
        high_ND, scale_N1 = quantised(x_ND, 1)
        rest_ND = x_ND.astype(jnp.float32) / jnp.where(scale_N1 > 0, scale_N1, 1.0) - high_ND
        low_ND = jnp.round(rest_ND * (2 * MOST)).astype(jnp.int8)  # the rest is within a half
        both = _matmul(jnp.concatenate([high_ND, low_ND]), self.q, jnp.int32, (axis,))
        high_NF, low_NF = jnp.split(both.astype(jnp.float32), 2)
        return (high_NF + low_NF / (2 * MOST)) * scale_N1 * self.scale_F


def matrix(rngs: nnx.Rngs, *axes: int, depth: int | None = None) -> nnx.Param:
    """A matrix `[..., fan_in, fan_out]` that keeps the variance of its input: truncated normal,
    std 1/sqrt(fan_in).

    Give `depth` for the two matrices of a layer that write to the residual stream: their std is
    divided by sqrt(2 depth), so the stream has the same size at any depth (GPT-2, section 2.3).
    """
    std = (axes[-2] * (2 * depth if depth else 1)) ** -0.5
    init = jax.nn.initializers.truncated_normal(std / 0.87962566103423978)
    return nnx.Param(init(rngs.params(), axes, jnp.float32))


def orthogonal(rngs: nnx.Rngs, fan_in: int, fan_out: int, scale: float = 1.0) -> nnx.Param:
    """A matrix of orthogonal rows or columns, by QR (Saxe et al., arXiv:1312.6120).

    Of several layers one after another: QRs of a batch wait for each other for ever where XLA runs
    a few such batches on two cores (jaxlib 0.10).
    """
    init = jax.nn.initializers.orthogonal(scale)
    alone = jax.custom_batching.sequential_vmap(lambda key: init(key, (fan_in, fan_out)))
    return nnx.Param(alone(rngs.params()))
