"""Inverses of unit lower triangular matrices, by products alone."""

import jax
import jax.numpy as jnp

from lcm.types import Array


@jax.custom_vjp
def inverse(strict: Array) -> Array:
    """`(I - A)^-1` of strictly lower triangular A, `[..., C, C]`.

    Of blocks on the diagonal, from size 1 up, two neighbours become one of twice the size,

        [ X    ]^-1   [ X^-1                 ]
        [ -A  Y]    = [ Y^-1 A X^-1     Y^-1 ]

    in log2(C) rounds. Squares of A, which would need as many, can grow beyond all digits where
    keys are alike; solvers of libraries go row by row, and from a CPU's thread to another.
    """
    count = strict.shape[-1]
    size = 1 << (count - 1).bit_length()
    widths = [(0, 0)] * (strict.ndim - 2) + [(0, size - count)] * 2
    found = _inverse(jnp.pad(strict, widths))
    return found[..., :count, :count]


def _inverse(strict: Array) -> Array:
    *outer, size, _ = strict.shape
    found = jnp.ones((*outer, size, 1, 1), strict.dtype)
    while (pairs := found.shape[-3] // 2) > 0:
        half = found.shape[-1]
        own = jnp.arange(pairs)
        blocks = strict.reshape(*outer, pairs, 2, half, pairs, 2, half)[..., 1, :, :, 0, :]
        corner = jnp.moveaxis(blocks, -2, -3)[..., own, own, :, :]
        first, second = found[..., 0::2, :, :], found[..., 1::2, :, :]
        corner = _matmul(_matmul(second, corner), first)
        upper = jnp.concatenate([first, jnp.zeros_like(first)], -1)
        found = jnp.concatenate([upper, jnp.concatenate([corner, second], -1)], -2)
    return found[..., 0, :, :]


def _forward(strict: Array) -> tuple[Array, Array]:
    found = inverse(strict)
    return found, found


def _backward(found: Array, d_found: Array) -> tuple[Array]:
    turned = found.swapaxes(-1, -2)
    return (_matmul(_matmul(turned, d_found), turned),)


inverse.defvjp(_forward, _backward)


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
