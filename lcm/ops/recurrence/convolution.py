"""The short causal convolution by channel that stands before a recurrence."""

import jax
import jax.numpy as jnp

from lcm.types import Array


def short_conv(
    x_BLC: Array,
    w_WC: Array,
    bias_C: Array,
    tail_BWC: Array,
    reset_BL: Array,
    there_BL: Array,
) -> tuple[Array, Array]:
    """`y_t = bias + sum_j w_j x_{t - (W - 1) + j}`, and the last `W - 1` tokens of each row.

    `w_{W-1}` is of the token itself. Taps do not reach over the beginning of a document (`reset`),
    nor see padding (where `there` is false), which stands before or behind the tokens of a row; the
    tail, `[B, W - 1, C]`, comes right before its first token.
    """
    width, length = len(w_WC), x_BLC.shape[1]
    document_BL, x, document = with_tail(x_BLC, tail_BWC, reset_BL, there_BL)
    y_BLC = bias_C.astype(x.dtype) + x_BLC * w_WC[-1].astype(x.dtype)
    for j in range(width - 1):
        seen_BL = document[:, j : j + length] == document_BL
        tap_BLC = x[:, j : j + length] * w_WC[j].astype(x.dtype)
        y_BLC += jnp.where(seen_BL[..., None], tap_BLC, 0)
    return y_BLC, last(x, document, width - 1).astype(tail_BWC.dtype)


def tail(x_BLC: Array, tail_BWC: Array, reset_BL: Array, there_BL: Array) -> Array:
    """The tail that `short_conv` gives, alone."""
    no_taps = jnp.zeros((tail_BWC.shape[1] + 1, x_BLC.shape[-1]))
    return short_conv(x_BLC, no_taps, no_taps[0], tail_BWC, reset_BL, there_BL)[1]


def with_tail(
    x_BLC: Array, tail_BWC: Array, reset_BL: Array, there_BL: Array
) -> tuple[Array, Array, Array]:
    """The document of each token, `[B, L]`, and x and documents of tail and tokens, `[B, W + L]`.

    The tail is of document 0, and so are the first tokens unless one of them is a reset; padding
    is of -1.
    """
    document_BL = jnp.where(there_BL, jnp.cumsum(reset_BL, 1), -1)
    whole = preceded(document_BL, jnp.zeros(tail_BWC.shape[:2], jnp.int32), there_BL, -1)
    return document_BL, preceded(x_BLC, tail_BWC, there_BL), whole


def preceded(x_BL: Array, tail_BW: Array, there_BL: Array, fill: int = 0) -> Array:
    """`[B, W + L, ...]`: x behind W places, with the tail right before its first token."""
    widths = [(0, 0), (tail_BW.shape[1], 0), *[(0, 0)] * (x_BL.ndim - 2)]
    padded = jnp.pad(x_BL, widths, constant_values=fill)

    def put(x: Array, tail: Array, first: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, tail.astype(x.dtype), first, 0)

    return jax.vmap(put)(padded, tail_BW, jnp.argmax(there_BL, 1))


def last(x: Array, document: Array, count: int) -> Array:
    """The last `count` tokens of each row that are no padding, zeros where they are of another
    document than the last of them."""
    number = jnp.cumsum(document >= 0, 1)
    wanted = number[:, -1:] - jnp.arange(count)[::-1]
    at = (number[:, None] < wanted[..., None]).sum(-1)  # the first place with so many so far
    same = jnp.take_along_axis(document, at, 1)
    taken = jnp.take_along_axis(x, at[..., None], 1)
    return jnp.where((same == same[:, -1:])[..., None], taken, 0)
