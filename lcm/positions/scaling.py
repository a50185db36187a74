"""Scalings of RoPE's frequencies, fixed or by the length of the document.

s = L'/L is the factor of extension, L the trained length (`original`; 0 takes `data.length`),
theta_i = base^(-2i/R) the frequencies before scaling, i = 0 .. R/2 - 1.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lcm.errors import ConfigError
from lcm.positions.base import About, Dims, Params
from lcm.positions.rope import Frequencies, RoPE
from lcm.types import Array


@dataclasses.dataclass(frozen=True)
class Scaled(RoPE):
    """A RoPE whose frequencies are scaled by `factor`."""

    factor: float = 1.0

    def check(self, dims: Dims) -> None:
        super().check(dims)
        if self.factor < 1:
            raise ConfigError(
                f"model.positions.factor={self.factor} would shorten the context: give 1 or more, "
                "the length to be read over the length trained on"
            )


@dataclasses.dataclass(frozen=True)
class Linear(Scaled):
    """Position interpolation: `theta_i / s` (Chen et al., 2023, arXiv:2306.15595)."""

    about: ClassVar = About(
        "PI", "theta_i / s", "Chen et al., 2023, arXiv:2306.15595; HF linear", "tune"
    )

    def frequencies(
        self, size: int, length: Array | int = 0, params: Params | None = None
    ) -> Frequencies:
        return self.theta(size) / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class NTK(Scaled):
    """`(base s^(R/(R-2)))^(-2i/R)`: the fastest pair stays, the slowest is divided by s."""

    about: ClassVar = About(
        "NTK-aware",
        "(base s^(R/(R-2)))^(-2i/R)",
        "bloc97, 2023 (r/LocalLLaMA)",
        "none",
    )

    def frequencies(
        self, size: int, length: Array | int = 0, params: Params | None = None
    ) -> Frequencies:
        return self.theta(size) * self.factor ** _stretch(self, size), 1.0


@dataclasses.dataclass(frozen=True)
class DynamicNTK(Scaled):
    """NTK-aware with `s = f n/L - (f - 1)` for a document of n > L tokens, plain up to L.

    length: tokens to be ready for; frequencies do not change before a document is longer. 0 follows
        the document as it grows, which re-rotates all keys at every step of a decoding.
    """

    original: int = 0
    length: int = 0

    cache: ClassVar = "raw"
    about: ClassVar = About(
        "dynamic NTK",
        "NTK-aware with s = f n/L - (f - 1), n the document's length",
        "emozilla, 2023; HF dynamic",
        "none",
        "keys are rotated at every step",
    )

    def frequencies(
        self, size: int, length: Array | int = 0, params: Params | None = None
    ) -> Frequencies:
        n = jnp.maximum(present(length, self.length), self.trained).astype(jnp.float32)
        scale = self.factor * n / self.trained - (self.factor - 1)
        return self.theta(size) * scale[..., None] ** _stretch(self, size), 1.0


@dataclasses.dataclass(frozen=True)
class ByParts(Scaled):
    """`(1 - g) theta_i / s + g theta_i`, g rising with a pair's turns in L from alpha to beta.

    NTK-by-parts as the YaRN paper defines it, by turns L theta_i / 2 pi; YaRN's code, and `YaRN`
    here, rise by the index of the pair instead.
    """

    original: int = 0
    alpha: float = 1.0
    beta: float = 32.0

    about: ClassVar = About(
        "NTK-by-parts",
        "(1 - g) theta_i / s + g theta_i, g = clip((L theta_i / 2 pi - alpha) / (beta - alpha))",
        "bloc97, 2023; arXiv:2309.00071, section 3.2",
        "none",
    )

    def check(self, dims: Dims) -> None:
        super().check(dims)
        _check_order(self, "alpha", "beta")

    def frequencies(
        self, size: int, length: Array | int = 0, params: Params | None = None
    ) -> Frequencies:
        theta = self.theta(size)
        turns = self.trained * theta / (2 * math.pi)
        keep = np.clip((turns - self.alpha) / (self.beta - self.alpha), 0, 1)
        return (1 - keep) * theta / self.factor + keep * theta, 1.0


@dataclasses.dataclass(frozen=True)
class YaRN(Scaled):
    """By-parts frequencies with a ramp over the index, and a temperature (arXiv:2309.00071).

        low = floor(dim(beta_fast)),  high = ceil(dim(beta_slow))
        dim(n) = R ln(L / 2 pi n) / 2 ln base
        ramp_i = clip((i - low) / (high - low)),  theta_i (1 - ramp_i) + theta_i / s ramp_i
        amplitude = 0.1 ln s + 1 on cosine and sine, so scores grow by its square

    attention_factor: the amplitude; 0 computes it.
    mscale, mscale_all_dim: if both are set the amplitude is the ratio of 0.1 mscale ln s + 1 for
        them (DeepSeek).
    truncate: round low and high outwards.
    """

    original: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    about: ClassVar = About(
        "YaRN",
        "theta_i (1 - ramp_i) + theta_i / s ramp_i, scores times (0.1 ln s + 1)^2",
        "Peng et al., ICLR 2024, arXiv:2309.00071; HF yarn",
        "none",
    )

    def check(self, dims: Dims) -> None:
        super().check(dims)
        _check_order(self, "beta_slow", "beta_fast")

    def frequencies(
        self, size: int, length: Array | int = 0, params: Params | None = None
    ) -> Frequencies:
        theta = self.theta(size)
        ramp = self.ramp(size)
        return theta * (1 - ramp) + theta / self.factor * ramp, self.amplitude(self.factor)

    def ramp(self, size: int) -> np.ndarray:
        """0 for pairs that stay, 1 for pairs that are divided by s, float64 `[R/2]`."""
        rotated = self.rotated(size)
        low, high = (
            rotated * math.log(self.trained / (2 * math.pi * turns)) / (2 * math.log(self.base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotated - 1)
        high += 0.001 if low == high else 0
        return np.clip((np.arange(rotated // 2) - low) / (high - low), 0, 1)

    def amplitude(self, factor: float) -> float:
        """On cosine and sine alike."""
        if self.attention_factor:
            return self.attention_factor
        scale = lambda weight: 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0  # noqa: E731
        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


@dataclasses.dataclass(frozen=True)
class DynamicYaRN(YaRN):
    """YaRN with s = max(1, n/L) for a document of n tokens; `factor` bounds s if it is above 1.

    length: tokens to be ready for, as in `DynamicNTK`.
    """

    length: int = 0

    cache: ClassVar = "raw"
    about: ClassVar = About(
        "dynamic YaRN",
        "YaRN with s = max(1, n/L), n the document's length",
        "arXiv:2309.00071, section 3.3",
        "none",
        "keys are rotated at every step",
    )

    def frequencies(
        self, size: int, length: Array | int = 0, params: Params | None = None
    ) -> Frequencies:
        n = present(length, self.length).astype(jnp.float32)
        scale = jnp.maximum(n / self.trained, 1.0)
        scale = jnp.minimum(scale, self.factor) if self.factor > 1 else scale
        theta, ramp = self.theta(size), self.ramp(size)
        amplitude = self.attention_factor or 0.1 * jnp.log(scale) + 1
        return theta * (1 - ramp) + theta * ramp / scale[..., None], amplitude


@dataclasses.dataclass(frozen=True)
class LongRoPE(Scaled):
    """`theta_i / e_i`, with one list of factors e up to L tokens and one beyond (arXiv:2402.13753).

    Scores grow by sqrt(1 + ln s / ln L)^2, short documents' too, s = `factor`.

    short, long: R/2 factors each.
    length: tokens to be ready for; 0 switches lists as a document grows past L.
    """

    original: int = 0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    attention_factor: float = 0.0
    length: int = 0

    cache: ClassVar = "raw"
    about: ClassVar = About(
        "LongRoPE",
        "theta_i / e_i, e by whether n <= L; scores times 1 + ln s / ln L",
        "Ding et al., ICML 2024, arXiv:2402.13753; HF longrope",
        "tune",
        "keys are rotated at every step",
    )

    def check(self, dims: Dims) -> None:
        super().check(dims)
        pairs = self.rotated(dims.head_size) // 2
        for name in ("short", "long"):
            factors = getattr(self, name)
            numbers = all(isinstance(f, int | float) and f > 0 for f in factors)
            if len(factors) != pairs or not numbers:
                raise ConfigError(
                    f"model.positions.{name} has {len(factors)} factors"
                    f"{'' if len(factors) != pairs else ', not all positive'}: longrope needs "
                    f"{pairs} positive ones, one for each pair of a head of {dims.head_size}"
                )

    def frequencies(
        self, size: int, length: Array | int = 0, params: Params | None = None
    ) -> Frequencies:
        n = present(length, self.length)
        theta = self.theta(size)
        short, long = (
            theta / np.asarray(self.short),
            theta / np.asarray(self.long),
        )
        return jnp.where((n > self.trained)[..., None], long, short), self.amplitude()

    def amplitude(self) -> float:
        """On cosine and sine alike."""
        if self.attention_factor:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.trained))


@dataclasses.dataclass(frozen=True)
class Llama3(ByParts):
    """Llama 3.1: by parts, with pairs of less than 1 turn divided by s and of more than 4 kept."""

    factor: float = 8.0
    beta: float = 4.0

    about: ClassVar = About(
        "Llama 3.1",
        "(1 - g) theta_i / s + g theta_i, g = clip((L theta_i / 2 pi - 1) / 3)",
        "Llama team, 2024, arXiv:2407.21783; HF llama3",
        "tune",
    )


@dataclasses.dataclass(frozen=True)
class Proportional(Scaled):
    """p-RoPE: the fastest int(p K / 2) of K/2 pairs turn, the others do not (arXiv:2410.06205).

    Exponents run over the whole head, `theta_i = base^(-2i/K)`, unlike a `fraction`.
    """

    p: float = 1.0

    about: ClassVar = About(
        "p-RoPE",
        "theta_i = base^(-2i/K) / s for i < p K / 2, else 0",
        "Barbero et al., 2024, arXiv:2410.06205; HF proportional",
        "from scratch",
    )

    def check(self, dims: Dims) -> None:
        super().check(dims)
        if not 0 <= self.p <= 1:
            raise ConfigError(f"model.positions.p={self.p} must lie between 0 (NoPE) and 1 (RoPE)")

    def frequencies(
        self, size: int, length: Array | int = 0, params: Params | None = None
    ) -> Frequencies:
        theta = self.theta(size) / self.factor
        return np.where(np.arange(len(theta)) < int(self.p * size // 2), theta, 0), 1.0


@dataclasses.dataclass(frozen=True)
class PowerBasis(RoPE):
    """`theta_i (1 - i / (R/2))^k`: fast pairs hardly change, slow ones slow down (Giraffe)."""

    k: float = 0.5

    about: ClassVar = About(
        "Giraffe, power basis",
        "theta_i (1 - i / (R/2))^k",
        "Pal et al., 2023, arXiv:2308.10882",
        "tune",
    )

    def check(self, dims: Dims) -> None:
        super().check(dims)
        if self.k < 0:
            raise ConfigError(f"model.positions.k={self.k} would speed pairs up: give 0 or more")

    def frequencies(
        self, size: int, length: Array | int = 0, params: Params | None = None
    ) -> Frequencies:
        theta = self.theta(size)
        return theta * (1 - np.arange(len(theta)) / len(theta)) ** self.k, 1.0


@dataclasses.dataclass(frozen=True)
class TruncatedBasis(RoPE):
    """Pairs of less than a turn in L share one slow frequency, the slowest stand still (Giraffe).

    theta_i if it is at least c = 2 pi / L; c / 16 down to c / 8; 0 below: constants of the release.
    """

    original: int = 0

    about: ClassVar = About(
        "Giraffe, truncated basis",
        "theta_i if theta_i >= c, c/16 if theta_i >= c/8, else 0; c = 2 pi / L",
        "Pal et al., 2023, arXiv:2308.10882",
        "tune",
    )

    def frequencies(
        self, size: int, length: Array | int = 0, params: Params | None = None
    ) -> Frequencies:
        theta, cut = self.theta(size), 2 * math.pi / self.trained
        slow = np.where(theta >= cut / 8, cut / 16, 0.0)
        return np.where(theta >= cut, theta, slow), 1.0


def present(length: Array | int, prepared: int) -> Array:
    """The length that frequencies are for: the document's, or what was prepared for if longer."""
    return jnp.maximum(jnp.asarray(length), prepared)


def _stretch(rope: RoPE, size: int) -> np.ndarray:
    """Exponents of the scale in NTK-aware frequencies, float64 `[R/2]`: 0 to -1."""
    rotated = rope.rotated(size)
    return -np.arange(0, rotated, 2) / max(rotated - 2, 1)


def _check_order(encoding: Any, low: str, high: str) -> None:
    least, most = getattr(encoding, low), getattr(encoding, high)
    if not 0 < least < most:
        raise ConfigError(
            f"model.positions.{low}={least} and {high}={most}: give 0 < {low} < {high}"
        )
