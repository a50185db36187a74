"""The time since the token before, on the input: what a model without a clock is told of it."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from lcm.errors import ConfigError
from lcm.positions.base import About, Dims, Params, PositionEncoding
from lcm.types import Array, Context, Hidden

# Angular speeds of log(1 + tau): from a turn over all intervals up to a day in seconds and more
# (log(1 + 86400) is 11.4), to one within a few percent of a time.
SLOWEST, FASTEST = 0.5, 128.0


@dataclasses.dataclass(frozen=True)
class Intervals(PositionEncoding):
    """Sines and cosines of the logarithm of `Context.interval_BL` (IC-Mamba, arXiv:2502.04655).

    unit: what intervals are counted in, about the shortest that are to be told apart.
    scale: the factor on unit-amplitude sinusoids; 0 gives each row the norm of a freshly
        initialised embedding, as in `Sinusoidal`.
    """

    unit: float = 1.0
    slowest: float = SLOWEST
    fastest: float = FASTEST
    scale: float = 0.0

    about: ClassVar = About(
        "interval embedding",
        "x + [sin, cos](w_m log(1 + tau / unit)), tau the time since the token before",
        "IC-Mamba, WWW 2025, arXiv:2502.04655",
        "from scratch",
    )

    def check(self, dims: Dims) -> None:
        if dims.width % 2:
            raise ConfigError(
                f"sinusoids come in pairs, model.width={dims.width} is odd: make it even"
            )
        if not self.unit > 0 or not 0 < self.slowest <= self.fastest:
            raise ConfigError(
                f"model.positions.unit={self.unit}, slowest={self.slowest}, fastest={self.fastest}:"
                " give a unit above 0, and speeds above 0, slowest first"
            )

    def embed(self, params: Params, x_BLD: Hidden, context: Context) -> Hidden:
        """The embeddings with sines and cosines of their intervals.

        Raises:
            ConfigError: for a context without intervals, as that of text is.
        """
        if context.interval_BL is None:
            raise ConfigError(
                "model.positions has intervals, and the context has none: give it interval_BL "
                "(lcm.nn.intervals), or choose another encoding"
            )
        width = x_BLD.shape[-1]
        signal_BLD = interval_embedding(
            context.interval_BL / self.unit, width, slowest=self.slowest, fastest=self.fastest
        )
        signal_BLD *= self.scale or (2 / width) ** 0.5
        return (x_BLD.astype(jnp.float32) + signal_BLD).astype(x_BLD.dtype)


def interval_embedding(
    tau_BL: Array, width: int, *, slowest: float = SLOWEST, fastest: float = FASTEST
) -> Array:
    """`[sin, cos](omega_m log(1 + tau))`, float32 `[B, L, width]`; M speeds, log-spaced.

    Raises:
        ValueError: for an odd width, or speeds that are no range above 0.
    """
    if width < 2 or width % 2:
        raise ValueError(f"width {width} has no sines and cosines in pairs: give an even one")
    if not 0 < slowest <= fastest:
        raise ValueError(f"speeds {slowest} to {fastest} are no range above 0: give slowest first")
    omega_M = np.geomspace(slowest, fastest, width // 2, dtype=np.float32)
    angle_BLM = jnp.log1p(tau_BL.astype(jnp.float32))[..., None] * omega_M
    return jnp.concatenate([jnp.sin(angle_BLM), jnp.cos(angle_BLM)], axis=-1)
