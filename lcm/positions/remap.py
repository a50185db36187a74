"""Remaps: a RoPE model reads far keys at distances it was trained on, without training.

Attention is split into regions of query and key, each a part with a rotation of its own; one
softmax runs over their union. `rho(i, j)` is the distance at which query i sees key j. Keys are
cached raw where their angle differs between regions.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.ops import attention
from lcm.ops.attention import Mask, Part
from lcm.positions import lengths
from lcm.positions.alibi import slopes
from lcm.positions.base import About, Dims, Params, PositionEncoding
from lcm.positions.rope import RoPE
from lcm.types import Array, Context, Keys, Queries


class Region(NamedTuple):
    """The keys that a mask shows, with the positions that queries and keys are rotated to."""

    mask: Mask
    q_pos: Array
    k_pos: Array


@dataclasses.dataclass(frozen=True)
class Remap(PositionEncoding):
    """Regions over a RoPE, which may be a scaled one."""

    rope: RoPE = RoPE()  # noqa: RUF009, frozen

    cache: ClassVar = "raw"

    def resolved(self, dims: Dims) -> "Remap":
        own = super().resolved(dims)
        return dataclasses.replace(own, rope=own.rope.resolved(dims))

    def check(self, dims: Dims) -> None:
        if not isinstance(self.rope, RoPE):
            raise ConfigError(
                f"model.positions.rope is {type(self.rope).__name__}, which has no rotation to "
                "remap: give rope or one of its scalings, such as yarn"
            )
        self.rope.check(dims)

    def init(self, key: jax.Array, dims: Dims) -> Params:
        return self.rope.init(key, dims)

    def prepare(self, params: Params) -> Params:
        return self.rope.prepare(params)

    def regions(self, q_pos: Array, k_pos: Array) -> tuple[Region, ...]:
        """Regions for positions of queries and keys; no key lies in two."""
        raise TypeError(f"{type(self).__name__} defines no regions")

    def parts(
        self,
        params: Params,
        q_BLHK: Queries,
        k_BSGK: Keys,
        q_context: Context,
        k_context: Context,
    ) -> tuple[Part, ...]:
        q_length, k_length = lengths.both(q_context, k_context)
        return tuple(
            Part(
                self.rope.rotate(q_BLHK, region.q_pos, q_length, params),
                self.rope.rotate(k_BSGK, region.k_pos, k_length, params),
                region.mask,
            )
            for region in self.regions(q_context.positions_BL, k_context.positions_BL)
        )


@dataclasses.dataclass(frozen=True)
class ReRoPE(Remap):
    """`rho = min(i - j, window)` (Su, 2023); join it with log_n for the release's temperature."""

    window: int = 512

    about: ClassVar = About(
        "ReRoPE",
        "rho = min(i - j, w)",
        "Su, 2023 (kexue.fm/archives/9708)",
        "none",
        "two products of queries and keys",
    )

    def check(self, dims: Dims) -> None:
        super().check(dims)
        _check_region(self, "window", dims)

    def regions(self, q_pos: Array, k_pos: Array) -> tuple[Region, ...]:
        near, far = _split(self.window)
        capped = jnp.full_like(q_pos, self.window)
        return Region(near, q_pos, k_pos), Region(far, capped, jnp.zeros_like(k_pos))


@dataclasses.dataclass(frozen=True)
class LeakyReRoPE(Remap):
    """`rho = i - j` within the window, `window + (i - j - window) / k` beyond (Su, 2023)."""

    window: int = 512
    k: float = 16.0

    about: ClassVar = About(
        "Leaky ReRoPE",
        "rho = i - j if i - j < w, else w + (i - j - w) / k",
        "Su, 2023 (kexue.fm/archives/9728)",
        "none",
        "two products of queries and keys",
    )

    def check(self, dims: Dims) -> None:
        super().check(dims)
        _check_region(self, "window", dims)
        if self.k < 1:
            raise ConfigError(f"model.positions.k={self.k} would stretch distances: give 1 or more")

    def regions(self, q_pos: Array, k_pos: Array) -> tuple[Region, ...]:
        near, far = _split(self.window)
        shifted = q_pos / self.k + self.window * (1 - 1 / self.k)
        return Region(near, q_pos, k_pos), Region(far, shifted, k_pos / self.k)


@dataclasses.dataclass(frozen=True)
class SelfExtend(Remap):
    """Exact distances within the window, beyond it those of groups of tokens (arXiv:2401.01325).

        rho = i // G - j // G + W - W // G   for i - j >= W

    group: G; window: W, best a multiple of G. About (L - W) G + W tokens are within reach.
    """

    group: int = 8
    window: int = 1024

    about: ClassVar = About(
        "Self-Extend",
        "rho = i - j if i - j < W, else i // G - j // G + W - W // G",
        "Jin et al., ICML 2024, arXiv:2401.01325",
        "none",
        "two products of queries and keys",
    )

    def check(self, dims: Dims) -> None:
        super().check(dims)
        _check_region(self, "window", dims)
        if self.group < 1:
            raise ConfigError(f"model.positions.group={self.group} must be at least 1 token")

    def regions(self, q_pos: Array, k_pos: Array) -> tuple[Region, ...]:
        near, far = _split(self.window)
        shift = self.window - self.window // self.group
        grouped = q_pos // self.group + shift, k_pos // self.group
        return Region(near, q_pos, k_pos), Region(far, *grouped)


@dataclasses.dataclass(frozen=True)
class DualChunk(Remap):
    """Distances within a chunk, to the chunk before, and to all earlier ones (arXiv:2402.17463).

    With chunks of S tokens, u = i mod S, v = j mod S, c = S + W:

        same chunk u - v,    the one before min(S + u, c - 1) - v,    earlier c - 1 - v

    Keys are rotated once, at v, and cached so. Join it with length_scale for Qwen2.5-1M's
    temperature. vLLM clamps to c, one more than the paper and than here.

    chunk: S; 0 takes 5/8 of the trained length, as ChunkLlama does. local: W; 0 takes 1/8.
    """

    chunk: int = 0
    local: int = 0
    original: int = 0

    about: ClassVar = About(
        "dual chunk attention",
        "rho = u - v, min(S + u, S + W - 1) - v or S + W - 1 - v; u, v = i, j mod S",
        "An et al., ICML 2024, arXiv:2402.17463; arXiv:2501.15383",
        "none",
        "three products of queries and keys",
    )

    @property
    def cache(self) -> str:
        return self.rope.cache

    def resolved(self, dims: Dims) -> "DualChunk":
        own = super().resolved(dims)
        chunk, local = own.chunk or 5 * own.original // 8, own.local or own.original // 8
        return dataclasses.replace(own, chunk=chunk, local=local)

    def check(self, dims: Dims) -> None:
        super().check(dims)
        if self.chunk < 1 or not 1 <= self.local <= self.chunk:
            raise ConfigError(
                f"model.positions.chunk={self.chunk} and local={self.local}: give a local window "
                "of at least 1 token that is not larger than the chunk"
            )
        if self.chunk + self.local > self.trained:
            raise ConfigError(
                f"model.positions.chunk={self.chunk} + local={self.local} reach beyond the trained "
                f"length {self.trained}: their sum is the largest distance, plus 1"
            )

    def keys(self, params: Params, k_BSGK: Keys, k_context: Context) -> Keys:
        if self.cache == "raw":
            return k_BSGK
        return self.rope.rotate(k_BSGK, k_context.positions_BL % self.chunk, params=params)

    def regions(self, q_pos: Array, k_pos: Array) -> tuple[Region, ...]:
        within, v = q_pos % self.chunk, k_pos % self.chunk
        last = self.chunk + self.local - 1
        chunks = attention.chunks
        return (
            Region(attention.causal() & chunks(self.chunk), within, v),
            Region(chunks(self.chunk, 1, 1), jnp.minimum(self.chunk + within, last), v),
            Region(chunks(self.chunk, 2, None), jnp.full_like(q_pos, last), v),
        )

    def parts(
        self,
        params: Params,
        q_BLHK: Queries,
        k_BSGK: Keys,
        q_context: Context,
        k_context: Context,
    ) -> tuple[Part, ...]:
        if self.cache == "raw":
            return super().parts(params, q_BLHK, k_BSGK, q_context, k_context)
        regions = self.regions(q_context.positions_BL, k_context.positions_BL)
        rotate = lambda positions: self.rope.rotate(q_BLHK, positions, params=params)  # noqa: E731
        return tuple(Part(rotate(region.q_pos), k_BSGK, region.mask) for region in regions)


@dataclasses.dataclass(frozen=True)
class _Lambda(PositionEncoding):
    """The fields of LM-Infinite."""

    window: int = 0
    sinks: int = 10
    cap: int = 0
    original: int = 0

    @property
    def reach(self) -> tuple[int, int]:
        return self.sinks, self.window

    def resolved(self, dims: Dims) -> PositionEncoding:
        own = super().resolved(dims)
        window = own.window or own.original
        return dataclasses.replace(own, window=window, cap=own.cap or window)

    def check(self, dims: Dims) -> None:
        super().check(dims)
        if self.sinks < 1:
            raise ConfigError(
                f"model.positions.sinks={self.sinks} must be at least 1: a plain window is "
                "model.window"
            )
        if not 1 <= self.window <= self.cap <= dims.length:
            raise ConfigError(
                f"model.positions.window={self.window} and cap={self.cap}: give "
                f"1 <= window <= cap <= the trained length {dims.length}"
            )


@dataclasses.dataclass(frozen=True)
class LMInfinite(_Lambda, Remap):
    """A window and the first tokens, those at distance `cap` at the most (arXiv:2308.16137).

    window: 0 takes the trained length. cap: 0 takes the window.
    """

    about: ClassVar = About(
        "LM-Infinite",
        "rho = min(i - j, cap), keys with i - j < window or j < sinks",
        "Han et al., NAACL 2024, arXiv:2308.16137",
        "none",
        "two products of queries and keys",
    )

    def regions(self, q_pos: Array, k_pos: Array) -> tuple[Region, ...]:
        (near, rest), (below, far) = _split(self.window), _split(self.cap)
        capped = jnp.full_like(q_pos, self.cap)
        first = attention.sinks(self.sinks)
        # Sinks that have left the window, nearer than the cap; the authors' code has none.
        between = [Region(first & rest & below, q_pos, k_pos)] if self.cap > self.window else []
        last = Region(first & far, capped, jnp.zeros_like(k_pos))
        return Region(near, q_pos, k_pos), *between, last


@dataclasses.dataclass(frozen=True)
class LMInfiniteALiBi(_Lambda):
    """LM-Infinite for ALiBi models: `-m_h min(i - j, cap)`, a window and the first tokens."""

    about: ClassVar = About(
        "LM-Infinite, ALiBi",
        "score - m_h min(i - j, cap), keys with i - j < window or j < sinks",
        "Han et al., NAACL 2024, arXiv:2308.16137",
        "none",
    )

    def parts(
        self,
        params: Params,
        q_BLHK: Queries,
        k_BSGK: Keys,
        q_context: Context,
        k_context: Context,
    ) -> tuple[Part, ...]:
        near, far = _split(self.window)
        slopes_H = jnp.asarray(slopes(q_BLHK.shape[2]), jnp.float32)
        bias = attention.CappedBias(slopes_H, self.cap)
        masks = near, attention.sinks(self.sinks) & far
        return tuple(Part(q_BLHK, k_BSGK, mask, bias) for mask in masks)


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Remap):
    """The first tokens and the latest ones, as if nothing lay between them (arXiv:2309.17453).

    Positions are those in a cache of `kept` tokens: of a query at kept - 1 or its own if less, of
    sinks their own, so that distances between kept neighbours are 1.

    kept: tokens that the cache holds, sinks included; 0 takes the trained length.
    """

    kept: int = 0
    sinks: int = 4
    original: int = 0

    about: ClassVar = About(
        "StreamingLLM",
        "rho = i - j for the last kept - sinks keys, min(i, kept - 1) - j for the sinks",
        "Xiao et al., ICLR 2024, arXiv:2309.17453",
        "none",
        "two products of queries and keys",
    )

    @property
    def reach(self) -> tuple[int, int]:
        return self.sinks, self.kept - self.sinks

    def resolved(self, dims: Dims) -> "StreamingLLM":
        own = super().resolved(dims)
        return dataclasses.replace(own, kept=own.kept or own.original)

    def check(self, dims: Dims) -> None:
        super().check(dims)
        if not 1 <= self.sinks < self.kept <= dims.length:
            raise ConfigError(
                f"model.positions.sinks={self.sinks} and kept={self.kept}: give 1 <= sinks < kept "
                f"<= the trained length {dims.length}"
            )

    def regions(self, q_pos: Array, k_pos: Array) -> tuple[Region, ...]:
        near, far = _split(self.kept - self.sinks)
        in_cache = jnp.minimum(q_pos, self.kept - 1)
        return Region(near, q_pos, k_pos), Region(
            attention.sinks(self.sinks) & far, in_cache, k_pos
        )


def _split(window: int) -> tuple[Mask, Mask]:
    """The last `window` keys up to the query, and all before them."""
    near = attention.window(window)
    return attention.causal() & near, attention.causal() & ~near


def _check_region(encoding: Remap, name: str, dims: Dims) -> None:
    size = getattr(encoding, name)
    if not 1 <= size <= dims.length:
        raise ConfigError(
            f"model.positions.{name}={size} must be at least 1 and at most the trained length "
            f"{dims.length}: beyond it distances are new to the model"
        )
