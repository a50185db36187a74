"""Rotary position embedding: the base of every scaling and remap."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from lcm.errors import ConfigError
from lcm.ops.attention import Part
from lcm.positions import lengths
from lcm.positions.base import About, Dims, Params, PositionEncoding
from lcm.types import Array, Context, Keys, Queries

SPLIT = 4096  # positions; angles up to there are exact enough in one product
Frequencies = tuple[Array, Array | float]


@dataclasses.dataclass(frozen=True)
class RoPE(PositionEncoding):
    """Queries and keys rotated by angles in proportion to their position (arXiv:2104.09864).

    theta_i = base^(-2i/R), i = 0 .. R/2 - 1, over the first R = fraction K numbers of a head; the
    others stay as they are. A scaling overrides `frequencies`.

    base: of the geometric series of frequencies.
    fraction: share of a head that is rotated.
    interleaved: pairs are (2i, 2i + 1), as in GPT-J, instead of (i, i + R/2), "rotate-half", as in
        Llama and Hugging Face checkpoints. A checkpoint works with one of them only.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    interleaved: bool = False

    about: ClassVar = About(
        "RoPE", "theta_i = base^(-2i/R)", "Su et al., 2021, arXiv:2104.09864", "from scratch"
    )

    def check(self, dims: Dims) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(
                f"model.positions.fraction={self.fraction} of a head cannot be rotated: "
                "give more than 0 and at most 1"
            )
        rotated = self.rotated(dims.head_size)
        if rotated % 2 or not rotated:
            of = "" if self.fraction == 1 else f" x positions.fraction={self.fraction}, {rotated},"
            raise ConfigError(
                f"RoPE rotates pairs, model.head_size={dims.head_size}{of} is "
                f"{'odd: make it even' if rotated else 'nothing: rotate 2 numbers or more'}"
            )
        if self.base <= 1:
            raise ConfigError(
                f"model.positions.base={self.base} must be above 1; the usual one is 10000"
            )

    def rotated(self, size: int) -> int:
        """R, the numbers of a head of `size` that are rotated."""
        return int(size * self.fraction)

    def theta(self, size: int) -> np.ndarray:
        """Frequencies before any scaling, float64 `[R/2]`."""
        rotated = self.rotated(size)
        return self.base ** (-np.arange(0, rotated, 2) / rotated)

    def frequencies(
        self, size: int, length: Array | int = 0, params: Params | None = None
    ) -> Frequencies:
        """Angular step per position `[..., R/2]`, and the factor on cosine and sine.

        float64 of numpy where it depends on nothing, float32 of jax otherwise.

        Args:
            size: K, of a head.
            length: tokens of the document, integers of any shape, for scalings that depend on it.
            params: of the encoding, where it has any.
        """
        return self.theta(size), 1.0

    def rotate(
        self,
        x_BLHK: Queries,
        positions_BL: Array,
        length_BL: Array | int = 0,
        params: Params | None = None,
    ) -> Queries:
        """Queries or keys rotated to positions; angles in float32 whatever the dtype.

        Interleaved pairs come out side by side: the order of a head's numbers does not matter to
        a product of a query and a key that were both rotated.
        """
        frequencies, factor = self.frequencies(x_BLHK.shape[-1], length_BL, params)
        angles = _angles(positions_BL[:, :, None, None], frequencies)
        if jnp.ndim(factor):
            factor = jnp.asarray(factor)[:, :, None, None]
        cos, sin = factor * jnp.cos(angles), factor * jnp.sin(angles)
        a, b, rest = self._halves(x_BLHK.astype(jnp.float32))
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
        return rotated.astype(x_BLHK.dtype)

    def _halves(self, x: Array) -> tuple[Array, Array, Array]:
        rotated = self.rotated(x.shape[-1])
        x, rest = x[..., :rotated], x[..., rotated:]
        if self.interleaved:
            return x[..., ::2], x[..., 1::2], rest
        return x[..., : rotated // 2], x[..., rotated // 2 :], rest

    def keys(self, params: Params, k_BSGK: Keys, k_context: Context) -> Keys:
        if self.cache == "raw":
            return k_BSGK
        return self.rotate(k_BSGK, k_context.positions_BL, params=params)

    def parts(
        self,
        params: Params,
        q_BLHK: Queries,
        k_BSGK: Keys,
        q_context: Context,
        k_context: Context,
    ) -> tuple[Part, ...]:
        if self.cache == "rotated":
            return (Part(self.rotate(q_BLHK, q_context.positions_BL, params=params), k_BSGK),)
        q_length, k_length = lengths.both(q_context, k_context)
        return (
            Part(
                self.rotate(q_BLHK, q_context.positions_BL, q_length, params),
                self.rotate(k_BSGK, k_context.positions_BL, k_length, params),
            ),
        )


def _angles(positions: Array, frequencies: Array) -> Array:
    """float32 angles `[B, L, 1, R/2]` up to whole turns, of positions `[B, L, 1, 1]`.

    A product near 10^6 would be rounded by 0.03 radians, so where frequencies are known in float64
    whole turns of every SPLIT positions are taken off there.
    """
    if not isinstance(frequencies, np.ndarray):
        frequencies = frequencies[:, :, None] if frequencies.ndim > 1 else frequencies
        return positions.astype(jnp.float32) * frequencies
    step = np.fmod(SPLIT * frequencies, 2 * np.pi).astype(np.float32)
    far, near = (x.astype(jnp.float32) for x in (positions // SPLIT, positions % SPLIT))
    return near * frequencies.astype(np.float32) + far * step
