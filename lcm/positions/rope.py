"""Rotary position embedding."""

import dataclasses

import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.ops.attention import Part
from lcm.positions.base import Dims, Params, PositionEncoding
from lcm.types import Array, Context, Keys, PerToken, Queries


@dataclasses.dataclass(frozen=True)
class RoPE(PositionEncoding):
    """Queries and keys rotated by angles in proportion to their position (arXiv:2104.09864).

    theta_i = base^(-2i/K); pairs are (i, i + K/2), "rotate-half", as in Llama and Hugging Face
    checkpoints. A scaled variant overrides `frequencies`.
    """

    base: float = 10_000.0

    def check(self, dims: Dims) -> None:
        if dims.head_size % 2:
            raise ConfigError(
                f"RoPE rotates pairs, model.head_size={dims.head_size} is odd: make it even"
            )
        if self.base <= 1:
            raise ConfigError(
                f"model.positions.base={self.base} must be above 1; the usual one is 10000"
            )

    def frequencies(self, head_size: int, length: int) -> tuple[Array, float]:
        """Angular step per position, float32 `[K/2]`, and the factor on cosine and sine."""
        exponents = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
        return self.base**-exponents, 1.0

    def rotate(self, x_BLHK: Queries, positions_BL: PerToken) -> Queries:
        """Queries or keys rotated to their positions; angles in float32 whatever the dtype."""
        size = x_BLHK.shape[-1]
        frequencies, factor = self.frequencies(size, x_BLHK.shape[1])
        angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies
        cos, sin = factor * jnp.cos(angles), factor * jnp.sin(angles)
        a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return rotated.astype(x_BLHK.dtype)

    def keys(self, params: Params, k_BSGK: Keys, k_context: Context) -> Keys:
        return self.rotate(k_BSGK, k_context.positions_BL)

    def parts(
        self,
        params: Params,
        q_BLHK: Queries,
        k_BSGK: Keys,
        q_context: Context,
        k_context: Context,
    ) -> tuple[Part, ...]:
        return (Part(self.rotate(q_BLHK, q_context.positions_BL), k_BSGK),)
