"""Encodings that act on scores by the distance of query and key, with or without parameters."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.ops import attention
from lcm.ops.attention import Part, ScoreMod
from lcm.positions.base import About, Dims, Params, PositionEncoding
from lcm.types import Context, Keys, Queries

LEAST = 0.01  # KERPLE's parameters are not less


@dataclasses.dataclass(frozen=True)
class Bias(PositionEncoding):
    """Plain attention with a score modification, which a subclass gives."""

    def score_mod(self, params: Params, heads: int) -> ScoreMod:
        """The modification for so many query heads."""
        raise TypeError(f"{type(self).__name__} defines no score modification")

    def parts(
        self,
        params: Params,
        q_BLHK: Queries,
        k_BSGK: Keys,
        q_context: Context,
        k_context: Context,
    ) -> tuple[Part, ...]:
        return (Part(q_BLHK, k_BSGK, score_mod=self.score_mod(params, q_BLHK.shape[2])),)


@dataclasses.dataclass(frozen=True)
class HardALiBi(Bias):
    """Head h of the first `local` sees its last h + 1 keys, the others all (arXiv:2402.01032)."""

    local: int = 0

    about: ClassVar = About(
        "Hard-ALiBi",
        "head h < local: keys with i - j <= h; other heads: no positions",
        "Jelassi et al., 2024, arXiv:2402.01032",
        "from scratch",
    )

    def resolved(self, dims: Dims) -> "HardALiBi":
        return dataclasses.replace(self, local=self.local or dims.heads // 2)

    def check(self, dims: Dims) -> None:
        if not 0 <= self.local <= dims.heads:
            raise ConfigError(
                f"model.positions.local={self.local} of model.heads={dims.heads} heads cannot be "
                f"local: give 1 to {dims.heads}, or 0 for half of them"
            )

    def score_mod(self, params: Params, heads: int) -> ScoreMod:
        return attention.Local(self.local)


@dataclasses.dataclass(frozen=True)
class T5(Bias):
    """A learned bias for each head and bucket of distance, shared by layers (arXiv:1910.10683).

    Distances below buckets / 2 have a bucket each, those up to `farthest` share the others by
    logarithm, all beyond share the last. T5 itself leaves out 1/sqrt(K), which its initialisation
    makes up for; here scores keep it.
    """

    buckets: int = 32
    farthest: int = 128
    std: float = 0.02

    about: ClassVar = About(
        "T5 bias",
        "score + table[bucket(i - j), h]",
        "Raffel et al., JMLR 2020, arXiv:1910.10683; HF T5",
        "from scratch",
    )

    def check(self, dims: Dims) -> None:
        if self.buckets < 2 or self.buckets % 2:
            raise ConfigError(
                f"model.positions.buckets={self.buckets} must be even and at least 2: half of them "
                "are of one distance each"
            )
        if self.farthest <= self.buckets // 2:
            raise ConfigError(
                f"model.positions.farthest={self.farthest} must be more than half of "
                f"{self.buckets} buckets, the distances with a bucket each"
            )

    def init(self, key: jax.Array, dims: Dims) -> Params:
        return {"table": self.std * jax.random.normal(key, (self.buckets, dims.heads))}

    def score_mod(self, params: Params, heads: int) -> ScoreMod:
        return attention.BucketBias(
            params["table"], attention.t5_starts(self.buckets, self.farthest)
        )


@dataclasses.dataclass(frozen=True)
class Kerple(Bias):
    """`-p_h ln(1 + a_h (i - j))`, p and a learned in each layer (arXiv:2205.09921)."""

    about: ClassVar = About(
        "KERPLE, logarithmic",
        "score - p_h ln(1 + a_h (i - j))",
        "Chi et al., NeurIPS 2022, arXiv:2205.09921",
        "from scratch",
    )

    def init_layer(self, key: jax.Array, dims: Dims) -> Params:
        p, a = jax.random.split(key)
        uniform = lambda key, most: jax.random.uniform(key, dims.heads, maxval=most)  # noqa: E731
        return self.project({"p": uniform(p, 2.0), "a": uniform(a, 1.0)})

    def project(self, params: Params) -> Params:
        return {
            **params,
            **{name: jnp.maximum(params[name], LEAST) for name in ("p", "a") if name in params},
        }

    def score_mod(self, params: Params, heads: int) -> ScoreMod:
        return attention.LogBias(params["p"], params["a"])


@dataclasses.dataclass(frozen=True)
class KerplePower(Kerple):
    """`-a_h (i - j)^p_h`, 0 < p <= 2 (arXiv:2205.09921); p = 1 is ALiBi with learned slopes."""

    about: ClassVar = About(
        "KERPLE, power",
        "score - a_h (i - j)^p_h",
        "Chi et al., NeurIPS 2022, arXiv:2205.09921",
        "from scratch",
    )

    def project(self, params: Params) -> Params:
        params = super().project(params)
        return {**params, "p": jnp.minimum(params["p"], 2.0)} if "p" in params else params

    def score_mod(self, params: Params, heads: int) -> ScoreMod:
        return attention.PowerBias(params["p"], params["a"])


@dataclasses.dataclass(frozen=True)
class Sandwich(Bias):
    """The product of two sinusoidal positions alone, by head (arXiv:2212.10356)."""

    base: float = 10_000.0
    dims: int = 128

    about: ClassVar = About(
        "Sandwich",
        "score + sum_k cos((i - j) / b^(2k/D)) H / (8 h), k = 1 .. D/2, h = 1 .. H",
        "Chi et al., ACL 2023, arXiv:2212.10356",
        "from scratch",
        "D/2 cosines a score",
    )

    def check(self, dims: Dims) -> None:
        if self.base <= 1 or self.dims < 2 or self.dims % 2:
            raise ConfigError(
                f"model.positions.base={self.base} must be above 1 and dims={self.dims} even and "
                "at least 2; the usual are 10000 and 128"
            )

    def score_mod(self, params: Params, heads: int) -> ScoreMod:
        return attention.CosineBias(heads, self.dims, self.base)


@dataclasses.dataclass(frozen=True)
class TypeOne(Bias):
    """Weights 1 / (n + 1)^2, which have a finite sum (arXiv:2307.10156)."""

    about: ClassVar = About(
        "Type 1",
        "score - 2 ln(i - j + 1)",
        "Qin et al., AAAI 2024, arXiv:2307.10156",
        "from scratch",
    )

    def score_mod(self, params: Params, heads: int) -> ScoreMod:
        return attention.LogBias(jnp.full(heads, 2.0), jnp.ones(heads))


@dataclasses.dataclass(frozen=True)
class TypeTwo(Bias):
    """Weights exp(-ln(n + 1)^2), which have a finite sum (arXiv:2307.10156)."""

    about: ClassVar = About(
        "Type 2",
        "score - ln(i - j + 1)^2",
        "Qin et al., AAAI 2024, arXiv:2307.10156",
        "from scratch",
    )

    def score_mod(self, params: Params, heads: int) -> ScoreMod:
        return attention.LogSquareBias()


@dataclasses.dataclass(frozen=True)
class Fire(Bias):
    """A network of the distance in units of the query's position (arXiv:2310.04418).

    shared: one network for all layers, as in arXiv:2402.09371, instead of one in each.
    c: initial steepness of the logarithm; learned.
    threshold: initial L below which positions count as L; learned as a multiple of it.
    """

    hidden: int = 32
    shared: bool = False
    c: float = 0.1
    threshold: float = 512.0

    about: ClassVar = About(
        "FIRE",
        "score + MLP(ln(c (i - j) + 1) / ln(c max(i, L) + 1))_h",
        "Li et al., ICLR 2024, arXiv:2310.04418",
        "from scratch",
        "a network of 32 hidden units a score",
    )

    def check(self, dims: Dims) -> None:
        if self.hidden < 1 or self.c <= 0 or self.threshold <= 0:
            raise ConfigError(
                f"model.positions.hidden={self.hidden}, c={self.c} and threshold={self.threshold} "
                "must be above 0; the usual are 32, 0.1 and 512"
            )

    def init(self, key: jax.Array, dims: Dims) -> Params:
        return self._network(key, dims) if self.shared else {}

    def init_layer(self, key: jax.Array, dims: Dims) -> Params:
        return {} if self.shared else self._network(key, dims)

    def _network(self, key: jax.Array, dims: Dims) -> Params:
        """Uniform in +-1/sqrt(fan in), as linear layers of the release begin."""
        keys = jax.random.split(key, 4)

        def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
            bound = fan_in**-0.5
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        return {
            "c": jnp.asarray(self.c),
            "multiplier": jnp.asarray(1.0),
            "inner": uniform(keys[0], (self.hidden,), 1),
            "inner_bias": uniform(keys[1], (self.hidden,), 1),
            "outer": uniform(keys[2], (self.hidden, dims.heads), self.hidden),
            "outer_bias": uniform(keys[3], (dims.heads,), self.hidden),
        }

    def score_mod(self, params: Params, heads: int) -> ScoreMod:
        return attention.FireBias(
            params["c"],
            self.threshold * params["multiplier"],
            params["inner"],
            params["inner_bias"],
            params["outer"],
            params["outer_bias"],
        )
