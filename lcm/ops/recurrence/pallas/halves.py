"""Products of a chunk's tokens with a decay for each channel between them, and their gradients.

    A[i, j] = sum_n x_in y_jn exp2(the sum of l_n from behind j through i, or up to but without it)

A difference of sums from the beginning would lose digits, and a product of exp2(G_i) and exp2(-G_j)
overflows. But two tokens lie in the two halves of just one block of 2, 4, ... C tokens, and from
the one in the first to the one in the second a number decays to the border of the halves, and from
there: neither factor is over 1. So blocks of each size have one product, as parts of 16 have in GLA
(arXiv:2312.06635, section 4.3), and no pair is left that needs an exponential of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from lcm.ops.recurrence.pallas.products import dot
from lcm.ops.tpu import SUBLANES
from lcm.types import Array


class Spans(NamedTuple):
    """Sums of log-decays `[C, N]`, to base 2, in halves of a size or, if it is C, in the chunk."""

    half: int
    through: Array  # from the beginning of a token's half through it
    before: Array  # up to but without it
    after: Array  # from behind it to the end


class Pairs(NamedTuple):
    """Rows `[C, N]` beside columns `[M C, N]`, M arrays of a chunk one after the other.

    strict: a token does not see itself, and its own decay does not count.
    dtype: of what is multiplied.
    """

    x: Array
    y: Array
    strict: bool
    dtype: DTypeLike

    def of_rows(self, spans: Spans) -> tuple[Array, Array]:
        """Decays from the border, of tokens in second halves alone where those are whole
        registers, and x with them."""
        decay = jnp.exp2(_second(spans.before if self.strict else spans.through, spans.half))
        return decay, (_second(self.x, spans.half) * decay).astype(self.dtype)

    def of_columns(self, spans: Spans) -> tuple[Array, Array]:
        """Decays to the border, and y with them."""
        decay = jnp.concatenate([jnp.exp2(spans.after)] * (len(self.y) // len(spans.after)))
        return decay, (self.y * decay).astype(self.dtype)


def spans_of(l_CN: Array) -> tuple[list[Spans], Spans]:
    """Of halves of 1, 2, ... C / 2, and of the chunk; sums are of like signs alone."""
    before = after = jnp.zeros_like(l_CN)
    row = jax.lax.broadcasted_iota(jnp.int32, l_CN.shape, 0)
    found, half, size = [], 1, len(l_CN)
    while half < size:
        through = before + l_CN
        found.append(Spans(half, through, before, after))
        whole, second = through + after, row & half != 0
        before += jnp.where(second, pltpu.roll(whole, half, 0), 0)
        after += jnp.where(second, 0, pltpu.roll(whole, size - half, 0))
        half *= 2
    return found, Spans(size, before + l_CN, before, after)


def products(pairs: Pairs, halves: Sequence[Spans]) -> Array:
    """A, `[C, M C]`; what is above the diagonals, and if strict on them, means nothing."""
    parting = _parting(pairs)
    found = jnp.zeros(parting.shape, jnp.float32)
    if not pairs.strict:
        found = dot(*(z.astype(pairs.dtype) for z in (pairs.x, pairs.y)), (1, 1))
    for spans in halves:
        own = dot(pairs.of_rows(spans)[1], pairs.of_columns(spans)[1], (1, 1))
        found = jnp.where(parting >= spans.half, _placed(own, spans.half), found)
    return found


class Gradients(NamedTuple):
    """Of x and y, and what each adds to those of sums of log-decays: x dx and y dy.

    The last two are without a token's product with itself, and of the factors as they were
    multiplied, so that of two tokens they are the same number.
    """

    x: Array
    y: Array
    of_x: Array
    of_y: Array


def gradients(pairs: Pairs, halves: Sequence[Spans], d_A: Array) -> Gradients:
    """Of A, whose own gradient is 0 where A means nothing."""
    parting = _parting(pairs)
    x, y, of_x, of_y = (jnp.zeros(z.shape, jnp.float32) for z in (pairs.x, pairs.y) * 2)
    if not pairs.strict:
        own = jnp.where(parting == 0, d_A, 0).astype(pairs.dtype)
        x = dot(own, pairs.y.astype(pairs.dtype), (1, 0))
        y = dot(own, pairs.x.astype(pairs.dtype), (0, 0))
    for spans in halves:
        half = spans.half
        own = jnp.where((parting >= half) & (parting < 2 * half), d_A, 0)
        own = _second(own, half).astype(pairs.dtype)
        (decay_x, near_x), (decay_y, near_y) = pairs.of_rows(spans), pairs.of_columns(spans)
        d_x, d_y = dot(own, near_y, (1, 0)), dot(own, near_x, (0, 0))
        x += _placed(decay_x * d_x, half)
        of_x += _placed(near_x * d_x, half)
        y += decay_y * d_y
        of_y += near_y * d_y
    return Gradients(x, y, of_x, of_y)


def _parting(pairs: Pairs) -> Array:
    """Numbers `[C, M C]` from h to 2 h - 1 where two tokens are in neighbouring halves of h."""
    size = len(pairs.x)
    row, column = (
        jax.lax.broadcasted_iota(jnp.int32, (size, len(pairs.y)), axis) for axis in (0, 1)
    )
    return row ^ (column & (size - 1))


def _second(x: Array, half: int) -> Array:
    """Rows in second halves, or all if those are not whole registers."""
    if half % SUBLANES:
        return x
    return jnp.concatenate([x[at : at + half] for at in range(half, len(x), 2 * half)])


def _placed(x: Array, half: int) -> Array:
    """Such rows among rows of 0."""
    if half % SUBLANES:
        return x
    nothing = jnp.zeros((half, x.shape[1]), x.dtype)
    parts = ([nothing, x[at : at + half]] for at in range(0, len(x), half))
    return jnp.concatenate([part for pair in parts for part in pair])
