"""Encodings on the input: learned, sinusoidal, and the countdown of length control."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.positions.base import About, Dims, Params, PositionEncoding
from lcm.positions.stretch import stretch
from lcm.types import Array, Context, Hidden, PerToken


@dataclasses.dataclass(frozen=True)
class NoPE(PositionEncoding):
    """No position encoding; the causal mask alone breaks the symmetry (arXiv:2305.19466)."""

    about: ClassVar = About(
        "NoPE", "none", "Kazemnejad et al., NeurIPS 2023, arXiv:2305.19466", "from scratch"
    )


@dataclasses.dataclass(frozen=True)
class Learned(PositionEncoding):
    """A learned table of positions added to the embeddings (GPT-2).

    A position past the table gives NaN, since a clamped one would be silent nonsense; `lcm.apply`
    and the evaluation refuse it with a message before that.

    length: rows; 0 takes the training length.
    keep: first rows that stay as they are where a trained table is stretched to `length`, the
        others are spread out (Long-CLIP); 0 spreads all. No gradient reaches them.
    """

    length: int = 0
    std: float = 0.02
    keep: int = 0

    about: ClassVar = About(
        "learned",
        "x + table[i]",
        "Gehring et al., 2017, arXiv:1705.03122; GPT-2",
        "from scratch",
    )

    def check(self, dims: Dims) -> None:
        if self.length and self.length < dims.length:
            raise ConfigError(
                f"model.positions.length={self.length} is shorter than the training length "
                f"data.length={dims.length}: set it to {dims.length} or more, or to 0"
            )
        if not 0 <= self.keep < self.limit(dims):
            raise ConfigError(
                f"model.positions.keep={self.keep} rows of {self.limit(dims)} cannot be kept: "
                "give 0 or more, and fewer than all"
            )

    def limit(self, dims: Dims) -> int:
        return self.length or dims.length

    def init(self, key: jax.Array, dims: Dims) -> Params:
        return {"table": self.std * jax.random.normal(key, (self.limit(dims), dims.width))}

    def adopt(self, params: Params, trained: Params) -> Params:
        table, rows = trained.get("table"), params["table"].shape[0]
        if table is None or table.shape[1:] != params["table"].shape[1:]:
            return params
        longer = table.shape[0] < rows
        return {"table": stretch(table, rows, self.keep) if longer else table[:rows]}

    def embed(self, params: Params, x_BLD: Hidden, context: Context) -> Hidden:
        table = params["table"]
        if self.keep:
            table = jnp.concatenate([jax.lax.stop_gradient(table[: self.keep]), table[self.keep :]])
        rows = table.at[context.positions_BL].get(mode="fill", fill_value=jnp.nan)
        return x_BLD + rows.astype(x_BLD.dtype)


@dataclasses.dataclass(frozen=True)
class Sinusoidal(PositionEncoding):
    """`PE(n)[2k] = sin(n / base^(2k/D))`, cosine beside it (Vaswani et al., arXiv:1706.03762).

    `scale` is the factor on unit-amplitude sinusoids; 0 gives each row the norm of a freshly
    initialised embedding (1, see lcm.nn.embedding), as unit amplitude would drown it.
    """

    base: float = 10_000.0
    scale: float = 0.0

    about: ClassVar = About(
        "sinusoidal",
        "x + [sin(i / b^(2k/D)), cos(i / b^(2k/D))]",
        "Vaswani et al., NeurIPS 2017, arXiv:1706.03762",
        "from scratch",
    )

    def check(self, dims: Dims) -> None:
        _check_sinusoid(dims, self.base)

    def embed(self, params: Params, x_BLD: Hidden, context: Context) -> Hidden:
        width = x_BLD.shape[-1]
        signal = sinusoid(context.positions_BL, width, self.base)
        return _add(x_BLD, (self.scale or (2 / width) ** 0.5) * signal)


@dataclasses.dataclass(frozen=True)
class Infused(Sinusoidal):
    """Position-infused attention: sinusoids join queries and keys of each layer, not values.

    Hidden states then hold no positions (Shortformer, Press et al., ACL 2021, arXiv:2012.15832).
    Layers project from normalised inputs, whose numbers have size 1, so unit amplitude is the
    scale of the paper; 0 takes it.
    """

    about: ClassVar = About(
        "position-infused attention",
        "q, k from x + [sin, cos], v from x",
        "Press et al., ACL 2021, arXiv:2012.15832",
        "from scratch",
    )

    def embed(self, params: Params, x_BLD: Hidden, context: Context) -> Hidden:
        return x_BLD

    def infuse(self, params: Params, x_BLD: Hidden, context: Context) -> Hidden:
        signal = sinusoid(context.positions_BL, x_BLD.shape[-1], self.base)
        return _add(x_BLD, (self.scale or 1.0) * signal)


@dataclasses.dataclass(frozen=True)
class Countdown(PositionEncoding):
    """LDPE / ORPE: a sinusoid of the tokens still to come (arXiv:2412.11937).

    Added to the embeddings wherever `context.remaining` is not negative, so the data decides
    between the two: LDPE counts down over prompt and response, ORPE over the response alone
    with -1 on the prompt. `scale` is s = (||E||_F / sqrt(V)) / sqrt(D/2), the ratio of the norm of
    a row of the embedding table to that of a sinusoid; 0 takes it from the table at
    initialisation, after which it is a parameter that no gradient reaches.
    """

    base: float = 10_000.0
    scale: float = 0.0

    about: ClassVar = About(
        "LDPE and ORPE",
        "x + s [sin(r / b^(2k/D)), cos(r / b^(2k/D))], r the tokens still to come",
        "Butcher et al., 2024, arXiv:2412.11937",
        "tune",
    )

    def check(self, dims: Dims) -> None:
        _check_sinusoid(dims, self.base)

    def init(self, key: jax.Array, dims: Dims) -> Params:
        # Rows of the embedding table have norm 1 in expectation when fresh (lcm.nn.embedding).
        return {"scale": jnp.asarray(self.scale or (2 / dims.width) ** 0.5)}

    def embed(self, params: Params, x_BLD: Hidden, context: Context) -> Hidden:
        remaining = context.remaining_BL
        signal = sinusoid(jnp.maximum(remaining, 0), x_BLD.shape[-1], self.base)
        scale = jax.lax.stop_gradient(params["scale"])
        return _add(x_BLD, jnp.where(remaining[..., None] >= 0, scale * signal, 0.0))


def countdown_scale(table_VD: Array) -> Array:
    """The Frobenius ratio of `Countdown` for a trained embedding table, a float32 scalar."""
    rows, width = table_VD.shape
    return jnp.linalg.norm(table_VD.astype(jnp.float32)) / (rows * width / 2) ** 0.5


def sinusoid(numbers_BL: PerToken, width: int, base: float) -> Array:
    """Interleaved sines and cosines of integers, float32 `[B, L, width]`."""
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = numbers_BL[..., None].astype(jnp.float32) * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*numbers_BL.shape, width)


def _add(x_BLD: Hidden, signal_BLD: Array) -> Hidden:
    return (x_BLD.astype(jnp.float32) + signal_BLD).astype(x_BLD.dtype)


def _check_sinusoid(dims: Dims, base: float) -> None:
    if dims.width % 2:
        raise ConfigError(f"sinusoids come in pairs, model.width={dims.width} is odd: make it even")
    if base <= 1:
        raise ConfigError(f"model.positions.base={base} must be above 1; the usual one is 10000")
