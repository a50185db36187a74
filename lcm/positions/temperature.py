"""Temperatures and masks that join another encoding: `log_n+yarn`, `head_scale+nope`.

Each multiplies the scores of its partner's parts, content alone or content and bias, by a factor of
the query, the document or the head; alone it acts on attention without positions.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.ops import attention
from lcm.ops.attention import Part
from lcm.positions import lengths
from lcm.positions.base import About, Dims, Params, PositionEncoding
from lcm.types import Array, Context


@dataclasses.dataclass(frozen=True)
class Temperature(PositionEncoding):
    """A factor on queries, and so on content scores, that a subclass gives."""

    def factor_BLH(self, params: Params, q_context: Context, k_context: Context) -> Array:
        """float32, broadcast to `[B, L, H]`."""
        raise TypeError(f"{type(self).__name__} defines no factor")

    def adapt(self, params: Params, part: Part, q_context: Context, k_context: Context) -> Part:
        factor = self.factor_BLH(params, q_context, k_context)
        q = part.q_BLHK.astype(jnp.float32) * factor[..., None]
        return dataclasses.replace(part, q_BLHK=q.astype(part.q_BLHK.dtype))


@dataclasses.dataclass(frozen=True)
class LogN(Temperature):
    """Queries past the trained length times ln(i + 1) / ln L (Su, 2021; arXiv:2202.12172).

    within: also those before it, whose factor is below 1; for training with it.
    """

    original: int = 0
    within: bool = False

    about: ClassVar = About(
        "log-n",
        "score max(1, ln(i + 1) / ln L)",
        "Su, 2021 (kexue.fm/archives/8823); Chiang and Cholak, ACL 2022, arXiv:2202.12172",
        "none",
    )

    def check(self, dims: Dims) -> None:
        _check_log(self.trained)

    def factor_BLH(self, params: Params, q_context: Context, k_context: Context) -> Array:
        factor = jnp.log(q_context.positions_BL + 1.0) / math.log(self.trained)
        return (factor if self.within else jnp.maximum(factor, 1.0))[..., None]


@dataclasses.dataclass(frozen=True)
class LogLength(Temperature):
    """All queries of a document of n tokens times ln n / ln L, above L (CLEX's `log_scale`)."""

    original: int = 0

    about: ClassVar = About(
        "log-n of the document",
        "score max(1, ln n / ln L), n the document's length",
        "CLEX, arXiv:2310.16450",
        "none",
    )

    def check(self, dims: Dims) -> None:
        _check_log(self.trained)

    def factor_BLH(self, params: Params, q_context: Context, k_context: Context) -> Array:
        n = lengths.lengths(q_context, k_context)
        return (jnp.log(jnp.maximum(n, self.trained)) / math.log(self.trained))[..., None]


@dataclasses.dataclass(frozen=True)
class LengthScale(Temperature):
    """YaRN's temperature by the document's length: scores times `(a ln(n/L) + 1)^2` beyond L.

    a = 0.1 with dual chunk attention in Qwen2.5-1M (arXiv:2501.15383); ChunkLlama's option is 0.05.
    """

    original: int = 0
    a: float = 0.1

    about: ClassVar = About(
        "length scale",
        "score (a ln(max(1, n/L)) + 1)^2, n the document's length",
        "Qwen2.5-1M, 2025, arXiv:2501.15383",
        "none",
    )

    def factor_BLH(self, params: Params, q_context: Context, k_context: Context) -> Array:
        n = lengths.lengths(q_context, k_context)
        return ((self.a * jnp.log(jnp.maximum(n / self.trained, 1.0)) + 1) ** 2)[..., None]


@dataclasses.dataclass(frozen=True)
class UniformScale(Temperature):
    """One factor for all layers, heads and positions (arXiv:2404.12224).

    factor: about `uniform_scale(s)` reads s times the trained length with a NoPE model.
    """

    factor: float = 1.0

    about: ClassVar = About(
        "UniformScale",
        "score c; c = 1 + 0.3973 ln s for NoPE",
        "Wang et al., Findings of ACL 2024, arXiv:2404.12224",
        "none",
    )

    def check(self, dims: Dims) -> None:
        _check_factor(self.factor)

    def factor_BLH(self, params: Params, q_context: Context, k_context: Context) -> Array:
        return jnp.full((1, 1, 1), self.factor)


def uniform_scale(s: float) -> float:
    """The factor fitted to the best ones of a 1.1B NoPE model at s times its length."""
    return 1 + 0.3973 * math.log(s)


@dataclasses.dataclass(frozen=True)
class HeadScale(Temperature):
    """A learned factor c >= 1 for each head of each layer (arXiv:2404.12224).

    Tune them alone: `--config.train.only=head_scale`. `factor` is where they begin, the best
    uniform one; c is kept at 1 or above after each step.
    """

    factor: float = 1.0

    about: ClassVar = About(
        "HeadScale",
        "score c_h, c_h >= 1 learned in each layer",
        "Wang et al., Findings of ACL 2024, arXiv:2404.12224",
        "tune",
    )

    def check(self, dims: Dims) -> None:
        _check_factor(self.factor)

    def init_layer(self, key: jax.Array, dims: Dims) -> Params:
        return {"head_scale": jnp.full(dims.heads, self.factor)}

    def project(self, params: Params) -> Params:
        kept = {"head_scale": jnp.maximum(params["head_scale"], 1.0)} if params else {}
        return {**params, **kept}

    def factor_BLH(self, params: Params, q_context: Context, k_context: Context) -> Array:
        return params["head_scale"].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class FloorScale(Temperature):
    """Queries times `1 + a ln(1 + floor((i + 1) / floor))`: a staircase (Llama 4's NoPE layers)."""

    a: float = 0.1
    floor: int = 8192

    about: ClassVar = About(
        "Llama 4 temperature",
        "score (1 + a ln(1 + floor((i + 1) / 8192)))",
        "Llama 4, 2025; HF llama4",
        "from scratch",
    )

    def check(self, dims: Dims) -> None:
        if self.floor < 1:
            raise ConfigError(f"model.positions.floor={self.floor} must be at least 1 token")

    def factor_BLH(self, params: Params, q_context: Context, k_context: Context) -> Array:
        steps = (q_context.positions_BL + 1) // self.floor
        return (1 + self.a * jnp.log1p(steps.astype(jnp.float32)))[..., None]


@dataclasses.dataclass(frozen=True)
class Aligned(PositionEncoding):
    """Scores, bias included, over one temperature T < 1 (arXiv:2311.00684).

    `lcm.evaluation.align_temperature` finds T by matching the largest probability, or the entropy,
    of attention at the new length with those at the trained length. No gradient reaches it.
    """

    temperature: float = 1.0

    about: ClassVar = About(
        "attention alignment",
        "(score + bias) / T",
        "Chi et al., Findings of NAACL 2024, arXiv:2311.00684",
        "none",
    )

    def check(self, dims: Dims) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"model.positions.temperature={self.temperature} must be above 0")

    def init(self, key: jax.Array, dims: Dims) -> Params:
        return {"temperature": jnp.asarray(self.temperature)}  # a search changes it as it runs

    def adapt(self, params: Params, part: Part, q_context: Context, k_context: Context) -> Part:
        scale = attention.Scale(1 / jax.lax.stop_gradient(params["temperature"]))
        return dataclasses.replace(part, score_mod=attention.compose(part.score_mod, scale))


@dataclasses.dataclass(frozen=True)
class Chunked(PositionEncoding):
    """Queries see the keys of their own chunk of positions alone (Llama 4's RoPE layers)."""

    size: int = 8192

    about: ClassVar = About(
        "chunked local attention",
        "keys with i // c = j // c",
        "Llama 4, 2025; HF llama4",
        "from scratch",
        "less than full attention",
    )

    @property
    def reach(self) -> tuple[int, int]:
        return 0, self.size

    def check(self, dims: Dims) -> None:
        if self.size < 1:
            raise ConfigError(f"model.positions.size={self.size} must be at least 1 token")

    def adapt(self, params: Params, part: Part, q_context: Context, k_context: Context) -> Part:
        return dataclasses.replace(part, mask=part.mask & attention.chunks(self.size))


def _check_factor(factor: float) -> None:
    if factor <= 0:
        raise ConfigError(f"model.positions.factor={factor} must be above 0; 1 changes nothing")


def _check_log(length: int) -> None:
    if length < 2:
        raise ConfigError(
            f"model.positions.original={length} has no logarithm to divide by: 2 or more"
        )
