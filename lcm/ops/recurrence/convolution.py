"""The short causal convolution by channel that stands before a recurrence."""

import jax
import jax.numpy as jnp

from lcm.types import Array

NOBODY = -2  # a document that no token is of, nor padding


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
    x, document = with_tail(x_BLC, tail_BWC, reset_BL, there_BL)
    y_BLC = bias_C.astype(x.dtype) + _taps(x, w_WC.astype(x.dtype), document)
    return y_BLC, last(x, document, len(w_WC) - 1).astype(tail_BWC.dtype)


@jax.custom_vjp
def _taps(x: Array, w_WC: Array, document: Array) -> Array:
    """The sum of `short_conv`, `[B, L, C]`, of x `[B, W - 1 + L, C]` and documents of both."""
    before = len(w_WC) - 1
    length = x.shape[1] - before
    y_BLC = x[:, before:] * w_WC[-1]
    for j in range(before):
        seen_BL = document[:, j : j + length] == document[:, before:]
        y_BLC += jnp.where(seen_BL[..., None], x[:, j : j + length] * w_WC[j], 0)
    return y_BLC


def _forward(x: Array, w_WC: Array, document: Array) -> tuple[Array, tuple]:
    return _taps(x, w_WC, document), (x, w_WC, document)


def _backward(kept: tuple[Array, Array, Array], d_BLC: Array) -> tuple[Array, Array, None]:
    """The same convolution from the end, of the gradient: the one that is derived adds up pieces
    that are padded each by itself, which takes a CPU six times as long."""
    x, w_WC, document = kept
    before = len(w_WC) - 1
    widths = (0, 0), (before, before)
    d = jnp.pad(d_BLC, (*widths, (0, 0)))
    reader = jnp.pad(document[:, before:], widths, constant_values=NOBODY)
    d_x, d_w = jnp.zeros_like(x), []
    for j, w_C in enumerate(w_WC):
        at = slice(before - j, before - j + x.shape[1])  # of the token that reads x by this tap
        own = jnp.where((reader[:, at] == document)[..., None], d[:, at], 0)
        d_x += own * w_C
        d_w.append(jnp.sum(own * x, (0, 1), dtype=jnp.float32).astype(w_C.dtype))
    return d_x, jnp.stack(d_w), None


_taps.defvjp(_forward, _backward)


def tail(x_BLC: Array, tail_BWC: Array, reset_BL: Array, there_BL: Array) -> Array:
    """The tail that `short_conv` gives, alone."""
    no_taps = jnp.zeros((tail_BWC.shape[1] + 1, x_BLC.shape[-1]))
    return short_conv(x_BLC, no_taps, no_taps[0], tail_BWC, reset_BL, there_BL)[1]


def with_tail(
    x_BLC: Array, tail_BWC: Array, reset_BL: Array, there_BL: Array
) -> tuple[Array, Array]:
    """x and documents of tail and tokens, `[B, W + L]`.

    The tail is of document 0, and so are the first tokens unless one of them is a reset; padding
    is of -1.
    """
    document_BL = jnp.where(there_BL, jnp.cumsum(reset_BL, 1), -1)
    whole = preceded(document_BL, jnp.zeros(tail_BWC.shape[:2], jnp.int32), there_BL, -1)
    return preceded(x_BLC, tail_BWC, there_BL), whole


def preceded(x_BL: Array, tail_BW: Array, there_BL: Array, fill: int = 0) -> Array:
    """`[B, W + L, ...]`: x behind W places, with the tail right before its first token."""
    width, rest = tail_BW.shape[1], [1] * (x_BL.ndim - 2)
    widths = [(0, 0), (width, 0), *[(0, 0)] * len(rest)]
    padded = jnp.pad(x_BL, widths, constant_values=fill)
    after_BL = jnp.arange(padded.shape[1]) - jnp.argmax(there_BL, 1)[:, None]
    # Chosen place by place: to write where each row begins is a scatter, whose gradient is slow.
    for n in range(width):
        own_BL = (after_BL == n).reshape(*after_BL.shape, *rest)
        padded = jnp.where(own_BL, tail_BW[:, n : n + 1].astype(padded.dtype), padded)
    return padded


def last(x: Array, document: Array, count: int) -> Array:
    """The last `count` tokens of each row that are no padding, zeros where they are of another
    document than the last of them."""
    number = jnp.cumsum(document >= 0, 1)
    wanted = number[:, -1:] - jnp.arange(count)[::-1]
    at = (number[:, None] < wanted[..., None]).sum(-1)  # the first place with so many so far
    same = jnp.take_along_axis(document, at, 1)
    taken = jnp.take_along_axis(x, at[..., None], 1)
    return jnp.where((same == same[:, -1:])[..., None], taken, 0)
