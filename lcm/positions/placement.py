"""Training positions: where the tokens of a batch are said to stand, drawn anew at each step.

A placement is a frozen dataclass, called as `placement(key, batch, length)` on a batch of rows of
`length * span` tokens, of which it keeps `length`. Positions stay strictly increasing within each
document, and those of a document that begins inside a row begin at 0. Targets are those of the
text: of a token before a gap it is the token that follows it there.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lcm.errors import ConfigError
from lcm.types import Array, Batch

TRUNCATED = 1000  # points of the normal distribution function of CREAM's release


@dataclasses.dataclass(frozen=True)
class Placement:
    """Positions as the data gives them."""

    about: ClassVar[str] = "positions as they are"

    @property
    def span(self) -> int:
        """Tokens that are read for each one that is trained on."""
        return 1

    def check(self, length: int) -> None:
        """Raises ConfigError if rows of `length` tokens cannot be placed so."""

    def __call__(self, key: jax.Array, batch: Batch, length: int) -> Batch:
        return batch


@dataclasses.dataclass(frozen=True)
class Randomised(Placement):
    """Each document gets a sorted random subset of 0 .. range - 1 (arXiv:2305.16843).

    Subsets are uniform, without replacement; documents of one row get disjoint ones.
    range: at least the tokens of a row; 0 takes twice as many.
    """

    range: int = 0

    about: ClassVar = "sorted random subset of 0 .. range - 1 (Ruoss et al., ACL 2023)"

    def check(self, length: int) -> None:
        if self.range and self.range < length:
            raise ConfigError(
                f"train.placement.range={self.range} has no room for a row of data.length={length} "
                f"tokens: give {length} or more, or 0 for {2 * length}"
            )

    def __call__(self, key: jax.Array, batch: Batch, length: int) -> Batch:
        rows = batch.tokens_BL.shape[0]
        size = self.range or 2 * length

        def row(key: jax.Array, segments: Array) -> Array:
            drawn = jax.random.permutation(key, size)[:length].astype(jnp.int32)
            # Documents lie one behind the other, so sorting by document keeps places.
            run = jnp.cumsum(jnp.diff(segments, prepend=segments[:1]) != 0)
            return jax.lax.sort((run, drawn), num_keys=2)[1]

        positions = jax.vmap(row)(jax.random.split(key, rows), batch.context.segments_BL)
        return batch._replace(context=batch.context._replace(positions_BL=positions))


@dataclasses.dataclass(frozen=True)
class Picked(Placement):
    """Keeps `length` tokens of each row and says where they stand."""

    def pick(self, key: jax.Array, length: int) -> tuple[Array, Array]:
        """Which tokens of a row, int32 `[L]`, and their positions, both strictly increasing."""
        raise TypeError(f"{type(self).__name__} picks nothing")

    def __call__(self, key: jax.Array, batch: Batch, length: int) -> Batch:
        keys = jax.random.split(key, batch.tokens_BL.shape[0])
        index, positions = jax.vmap(lambda key: self.pick(key, length))(keys)
        picked = jax.tree.map(lambda x: jnp.take_along_axis(x, index, axis=1), batch)
        segments = picked.context.segments_BL
        places = jnp.arange(length)
        new = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
        first = jax.lax.cummax(jnp.where(new, places, 0), axis=1)
        start = jnp.where(first > 0, jnp.take_along_axis(positions, first, axis=1), 0)
        context = picked.context._replace(positions_BL=(positions - start).astype(jnp.int32))
        return picked._replace(context=context)


@dataclasses.dataclass(frozen=True)
class PoSE(Picked):
    """Two chunks of a longer text, the second moved on by a random skip (arXiv:2309.10400).

    r tokens at positions 0 .. r - 1, then T - r at r + k .. T - 1 + k; r is uniform in
    1 .. ceil(T/2), k in 0 .. (s - 1) T; the second chunk ends anywhere in the text.

    factor: s. text: tokens read, as a multiple of T.
    """

    factor: int = 4
    text: int = 5

    about: ClassVar = "two chunks with a random skip between them (Zhu et al., ICLR 2024)"

    @property
    def span(self) -> int:
        return self.text

    def check(self, length: int) -> None:
        _check_at_least(self, 1, "factor", "text")

    def pick(self, key: jax.Array, length: int) -> tuple[Array, Array]:
        first, skip, end = jax.random.split(key, 3)
        r = jax.random.randint(first, (), 1, -(-length // 2) + 1)
        k = jax.random.randint(skip, (), 0, (self.factor - 1) * length + 1)
        e = jax.random.randint(end, (), 0, (self.text - 1) * length + 1)
        at = jnp.arange(length)
        return at + jnp.where(at < r, 0, e), at + jnp.where(at < r, 0, k)


@dataclasses.dataclass(frozen=True)
class CREAM(Picked):
    """Head, middle and tail of a text of s T tokens (arXiv:2406.07138).

        0 .. h-1,    e-m+1 .. e,    sT-h .. sT-1,    m = T - 2h,   h = T // 3 or 4 s, evenly
        e uniform in h + floor((m-1) a/2) .. (a/2) T - h - 1,   a = floor(x)

    x is drawn from a normal distribution of mean 1 + s and deviation 3 on 2 .. 2s, by its
    distribution function on 1,000 points, which the release does not normalise: the ends get what
    lies beyond them. h is drawn for each row, as in the paper, not once for 3,000.

    factor: s. text: tokens read, as a multiple of T: s, so that each token is the one at its
    position, which 0 takes too, or 1 for T tokens in one piece.
    """

    factor: int = 4
    text: int = 0
    deviation: float = 3.0

    about: ClassVar = "head, middle and tail of the target length (Wu et al., NeurIPS 2024)"

    @property
    def span(self) -> int:
        return self.text or self.factor

    def check(self, length: int) -> None:
        _check_at_least(self, 1, "factor")
        if self.span not in (1, self.factor):
            raise ConfigError(
                f"train.placement.text={self.text} must be 1, or the factor {self.factor}, or 0"
            )
        if length % 2 or length < 12 or 8 * self.factor >= length:
            raise ConfigError(
                f"train.placement=cream with factor={self.factor} needs an even data.length of "
                f"at least {max(12, 8 * self.factor + 2)}, this is {length}"
            )

    def pick(self, key: jax.Array, length: int) -> tuple[Array, Array]:
        which, where, uniform = jax.random.split(key, 3)
        s = self.factor
        h = jnp.where(jax.random.bernoulli(which), length // 3, 4 * s)
        m = length - 2 * h
        a = jnp.floor(self.quantile(jax.random.uniform(where))).astype(jnp.int32)
        low, high = h + (m - 1) * a // 2, a * length // 2 - h - 1
        e = jax.random.randint(uniform, (), low, jnp.maximum(high, low) + 1)
        at = jnp.arange(length)
        middle, tail = e - m + 1 - h, s * length - length
        positions = at + jnp.where(at < h, 0, jnp.where(at < h + m, middle, tail))
        return (at if self.span == 1 else positions), positions

    def quantile(self, u: Array) -> Array:
        """x for a uniform number: linear between points of the distribution function."""
        x = np.linspace(2, 2 * self.factor, TRUNCATED)
        z = (x - (1 + self.factor)) / (self.deviation * math.sqrt(2))
        cdf = 0.5 * (1 + np.vectorize(math.erf)(z))
        return jnp.interp(u, jnp.asarray(cdf), jnp.asarray(x))


@dataclasses.dataclass(frozen=True)
class Segmented(Picked):
    """Some chunks of a longer text, each token at its own place in it (arXiv:2310.14633).

    factor: tokens read, as a multiple of T. chunk: tokens of a chunk. prefix: the last T/2 tokens
    are always kept, and chunks fill the other half.
    """

    factor: int = 4
    chunk: int = 16
    prefix: bool = False

    about: ClassVar = "chunks of a longer text at their own places (Karypis et al., NAACL 2024)"

    @property
    def span(self) -> int:
        return self.factor

    def check(self, length: int) -> None:
        _check_at_least(self, 1, "factor", "chunk")
        half = length // 2 if self.prefix else length
        if half % self.chunk:
            raise ConfigError(
                f"train.placement.chunk={self.chunk} does not divide the {half} tokens that chunks "
                f"fill: give a divisor of {half}"
            )

    def pick(self, key: jax.Array, length: int) -> tuple[Array, Array]:
        kept = length // 2 if self.prefix else 0
        there = (self.factor * length - kept) // self.chunk
        wanted = (length - kept) // self.chunk
        chosen = jnp.sort(jax.random.permutation(key, there)[:wanted])
        index = (chosen[:, None] * self.chunk + jnp.arange(self.chunk)).reshape(-1)
        index = jnp.concatenate(
            [index, jnp.arange(self.factor * length - kept, self.factor * length)]
        )
        return index.astype(jnp.int32), index.astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class CLEXScales(Picked):
    """Positions spread over t trained windows, t drawn for each step (arXiv:2310.16450).

    t is uniform in 1 .. factor; the first position is 0, the last t T - 1, and those between a
    random subset. Positions are counted in 1 / c of a token where data.length is c trained windows:
    give the encoding `unit=c`.
    """

    factor: int = 16

    about: ClassVar = "random positions over 1 .. factor windows, for clex (Chen et al., ICLR 2024)"

    def check(self, length: int) -> None:
        _check_at_least(self, 1, "factor")
        if length < 2:
            raise ConfigError(f"train.placement=clex needs data.length of 2 or more, not {length}")

    def __call__(self, key: jax.Array, batch: Batch, length: int) -> Batch:
        scale, rows = jax.random.split(key)
        t = jax.random.randint(scale, (), 1, self.factor + 1)
        return _Spread(t, self.factor)(rows, batch, length)


@dataclasses.dataclass(frozen=True)
class _Spread(Picked):
    scale: Array
    most: int

    def pick(self, key: jax.Array, length: int) -> tuple[Array, Array]:
        inside = self.scale * length - 2
        score = jax.random.uniform(key, (self.most * length,))
        score = jnp.where(jnp.arange(self.most * length) < inside, score, -1.0)
        drawn = jnp.sort(jax.lax.top_k(score, length - 2)[1]) + 1
        ends = jnp.zeros(1, jnp.int32), (inside + 1)[None].astype(jnp.int32)
        return jnp.arange(length), jnp.concatenate([ends[0], drawn.astype(jnp.int32), ends[1]])


@dataclasses.dataclass(frozen=True)
class Jittered(Picked):
    """Steps of U(0, 2) tokens, shrunk where they pass T (Giraffe, arXiv:2308.10882).

    Positions are counted in 1 / unit of a token, one at the least from token to token: train with
    an encoding that divides them, such as `linear` of factor `unit`.
    """

    unit: int = 64

    about: ClassVar = "random steps of mean 1 (Giraffe, Pal et al., 2023)"

    def check(self, length: int) -> None:
        _check_at_least(self, 1, "unit")

    def pick(self, key: jax.Array, length: int) -> tuple[Array, Array]:
        steps = jax.random.uniform(key, (length,), maxval=2.0)
        places = jnp.cumsum(steps)
        places = places * length / jnp.maximum(places[-1], length)
        at = jnp.arange(length)
        apart = jax.lax.cummax(jnp.floor(places * self.unit).astype(jnp.int32) - at)
        return at, apart + at


PLACEMENTS: dict[str, type[Placement]] = {
    "plain": Placement,
    "randomised": Randomised,
    "pose": PoSE,
    "cream": CREAM,
    "segmented": Segmented,
    "clex": CLEXScales,
    "jittered": Jittered,
}


def _check_at_least(placement: Placement, least: int, *names: str) -> None:
    for name in names:
        if getattr(placement, name) < least:
            raise ConfigError(
                f"train.placement.{name}={getattr(placement, name)} must be at least {least}"
            )
