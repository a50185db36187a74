"""Score modifications of the literature on relative positions; `n = i - j` is the distance.

What lies after the query is hidden by the mask, so distances below 0 are taken as 0: their values
do not matter, their gradients must be finite.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lcm.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CappedBias:
    """`score - slope_h min(n, cap)`: ALiBi as LM-Infinite has it (arXiv:2308.16137)."""

    slopes_H: Array
    cap: int = dataclasses.field(metadata={"static": True})

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return score - self.slopes_H[head] * jnp.minimum(q_pos - k_pos, self.cap)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Local:
    """Heads below `heads` see the last `head + 1` keys alone: Hard-ALiBi (arXiv:2402.01032)."""

    heads: int = dataclasses.field(metadata={"static": True})

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return jnp.where((head < self.heads) & (q_pos - k_pos > head), -jnp.inf, score)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BucketBias:
    """`score + table[bucket(n), h]`, where bucket m begins at distance `starts[m]` (T5).

    Distances are compared with integers: a logarithm in float32 may fall on either side of one.
    """

    table_NH: Array
    starts: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        distance = jnp.maximum(q_pos - k_pos, 0)
        exact = sum(a == m for m, a in enumerate(self.starts))  # buckets of one distance each
        bucket = jnp.minimum(distance, exact - 1)
        for start in self.starts[exact:]:
            bucket = bucket + (distance >= start)
        return score + self.table_NH[bucket, head]


def t5_starts(buckets: int, farthest: int) -> tuple[int, ...]:
    """First distance of each causal bucket: one each up to half of them, then by logarithm.

    bucket(n) = e + floor(ln(n / e) / ln(farthest / e) e) from n = e = buckets / 2 on, and the last
    bucket from where that reaches it (Raffel et al., JMLR 2020).
    """
    exact = buckets // 2
    rest = range(buckets - exact)
    grown = (exact * (farthest / exact) ** (m / (buckets - exact)) for m in rest)
    return (*range(exact), *(math.ceil(start - 1e-9) for start in grown))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogBias:
    """`score - p_h ln(1 + a_h n)`: KERPLE's logarithmic kernel (arXiv:2205.09921)."""

    p_H: Array
    a_H: Array

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return score - self.p_H[head] * jnp.log1p(self.a_H[head] * _distance(q_pos, k_pos))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PowerBias:
    """`score - a_h n^p_h`: KERPLE's power kernel (arXiv:2205.09921)."""

    p_H: Array
    a_H: Array

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        distance = _distance(q_pos, k_pos)
        # 0^p has no finite gradient for p < 1, so distance 0 never meets the power.
        power = jnp.exp(self.p_H[head] * jnp.log(jnp.maximum(distance, 1.0)))
        return score - self.a_H[head] * jnp.where(distance > 0, power, 0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogSquareBias:
    """`score - ln(n + 1)^2`: the second bias whose weights can be summed (arXiv:2307.10156)."""

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return score - jnp.log1p(_distance(q_pos, k_pos)) ** 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CosineBias:
    """`score + sum_m cos(n base^(-2m/D)) / (8 (h + 1) / H)`, m = 1 to D/2 (arXiv:2212.10356)."""

    heads: int = dataclasses.field(metadata={"static": True})
    dims: int = dataclasses.field(metadata={"static": True})
    base: float = dataclasses.field(metadata={"static": True})

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        distance = _distance(q_pos, k_pos)
        total = jnp.zeros_like(score)
        for m in range(1, self.dims // 2 + 1):
            total = total + jnp.cos(distance * self.base ** (-2 * m / self.dims))
        return score + total * (self.heads / (8.0 * (head + 1)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FireBias:
    """FIRE (arXiv:2310.04418): a small network of a distance in units of the query's position.

        x = ln(c n + 1) / (ln(c max(i, L) + 1) + 1e-6),   score + sum_f relu(w_f x + b_f) o_fh + d_h

    with |c| and |L| in place of c and L. Positions are those of the context, random ones included.
    """

    c: Array
    threshold: Array
    inner_F: Array
    inner_bias_F: Array
    outer_FH: Array
    outer_bias_H: Array

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        log = lambda n: jnp.log1p(jnp.abs(self.c) * n)  # noqa: E731
        far = jnp.maximum(q_pos.astype(jnp.float32), jnp.abs(self.threshold))
        x = log(_distance(q_pos, k_pos)) / (log(far) + 1e-6)
        score = score + self.outer_bias_H[head]
        if score.ndim > 2:
            inner, bias = (w.reshape(-1, *[1] * x.ndim) for w in (self.inner_F, self.inner_bias_F))
            return score + _by_head(jax.nn.relu(x * inner + bias), self.outer_FH, head)
        # A tile of a kernel, which has no third axis
        for inner, bias, outer_H in zip(
            self.inner_F, self.inner_bias_F, self.outer_FH, strict=True
        ):
            score = score + jax.nn.relu(x * inner + bias) * outer_H[head]
        return score


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Within:
    """Keys at a distance below `window` alone, where that is not known before tracing."""

    window: Array

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return jnp.where(q_pos - k_pos < self.window, score, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scale:
    """`factor * score`, content and whatever was added before it."""

    factor: Array | float

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return score * self.factor


def _by_head(hidden: Array, outer_FH: Array, head: Array) -> Array:
    """`sum_f outer_fh hidden_f` for `hidden [F, ...]`, with heads on the axes that `head` has.

    One matmul for all heads, wide on a CPU: sums of F products and their gradients take longer.
    """
    width, *shape = hidden.shape
    missing = len(shape) - head.ndim
    axes = [missing + axis for axis, size in enumerate(head.shape) if size > 1]
    sizes = [size for size in head.shape if size > 1]
    rest = [size for axis, size in enumerate(shape) if axis not in axes]
    out = outer_FH[:, head.reshape(-1)].T @ hidden.reshape(width, -1)
    return jnp.moveaxis(out.reshape(*sizes, *rest), range(len(axes)), axes)


def _distance(q_pos: Array, k_pos: Array) -> Array:
    return jnp.maximum(q_pos - k_pos, 0).astype(jnp.float32)
