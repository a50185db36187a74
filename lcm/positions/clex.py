"""CLEX: frequencies as a learned function of the scale."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lcm.errors import ConfigError
from lcm.positions.base import About, Dims, Params
from lcm.positions.rope import Frequencies
from lcm.positions.scaling import Scaled, present
from lcm.types import Array


@dataclasses.dataclass(frozen=True)
class CLEX(Scaled):
    """`theta(t)` solves a learned differential equation from theta(1) = RoPE (arXiv:2310.16450).

        z = ln theta,   dz/dt = act((z + ln ntk(t)) W_up) W_down + d ln ntk(t) / dt
        ntk_i(t) = (b (2t - 1)^(R/(R-2)))^(-2i/R),   t = ceil(n / L) up to t_max, n the length

    With W_down = 0, as it begins, it is NTK-aware. Train with `train.placement=clex`. As in the
    authors' code, not the paper, ntk takes 2t - 1 and, within act, the base 10,000 whatever the
    model's is. Solved by RK4 from one whole t to the next, once for all layers.

    factor: t_max.
    hidden: columns of W_up as a multiple of R.
    steps: of the solver for each unit of t; the release takes 100, 8 differ from it by 1e-5.
    unit: positions to a token, where sampled positions stand between tokens.
    length: tokens to be ready for; 0 follows the document as it grows.
    """

    factor: float = 16.0
    original: int = 0
    hidden: int = 1
    steps: int = 8
    activation: str = "tanh"
    unit: int = 1
    length: int = 0

    cache: ClassVar = "raw"
    about: ClassVar = About(
        "CLEX",
        "d ln theta/dt = act((ln theta + ln ntk(t)) W_up) W_down + d ln ntk(t)/dt, t = ceil(n/L)",
        "Chen et al., ICLR 2024, arXiv:2310.16450",
        "tune",
        "keys are rotated at every step",
    )

    def check(self, dims: Dims) -> None:
        super().check(dims)
        for name in ("hidden", "steps", "unit"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"model.positions.{name}={getattr(self, name)} must be at least 1"
                )
        if self.activation not in _ACTIVATIONS:
            raise ConfigError(
                f"model.positions.activation={self.activation!r} is unknown: choose from "
                f"{', '.join(_ACTIVATIONS)}"
            )

    def init(self, key: jax.Array, dims: Dims) -> Params:
        rotated = self.rotated(dims.head_size)
        wide = self.hidden * rotated
        bound = wide**-0.5  # Kaiming's over the second axis, as in the release
        up = jax.random.uniform(key, (rotated // 2, wide), minval=-bound, maxval=bound)
        return {"up": up, "down": jnp.zeros((wide, rotated // 2))}

    def prepare(self, params: Params) -> Params:
        return {**params, "growth": self.growth(params)}

    def growth(self, params: Params) -> Array:
        """ln theta(t) - ln theta(1) for t = 1 .. t_max, float32 `[t_max, R/2]`; row 0 is 0."""
        pairs = params["up"].shape[0]
        rotated, size = 2 * pairs, 1 / self.steps
        index = np.arange(pairs)
        start = jnp.asarray(-2 * index / rotated * np.log(self.base), jnp.float32)
        reference = jnp.asarray(-2 * index / rotated * np.log(10_000.0), jnp.float32)
        slope = jnp.asarray(-2 * index / max(rotated - 2, 1), jnp.float32)
        act = _ACTIVATIONS[self.activation]

        def change(t: Array, grown: Array) -> Array:
            ntk = reference + slope * jnp.log(2 * t - 1)
            learned = act((start + grown + ntk) @ params["up"]) @ params["down"]
            return learned + slope * 2 / (2 * t - 1)

        def step(grown: Array, t: Array) -> tuple[Array, None]:
            a = change(t, grown)
            b = change(t + size / 2, grown + size / 2 * a)
            c = change(t + size / 2, grown + size / 2 * b)
            d = change(t + size, grown + size * c)
            return grown + size / 6 * (a + 2 * b + 2 * c + d), None

        def unit(grown: Array, t: Array) -> tuple[Array, Array]:
            grown, _ = jax.lax.scan(step, grown, t + size * jnp.arange(self.steps))
            return grown, grown

        zero = jnp.zeros(pairs)
        _, rows = jax.lax.scan(unit, zero, jnp.arange(1.0, int(self.factor)))
        return jnp.concatenate([zero[None], rows])

    def frequencies(
        self, size: int, length: Array | int = 0, params: Params | None = None
    ) -> Frequencies:
        grown = params["growth"] if "growth" in params else self.growth(params)
        n = -(-present(length, self.length * self.unit) // self.unit)
        t = jnp.clip(-(-n // self.trained), 1, len(grown))
        theta = jnp.asarray(self.theta(size) / self.unit, jnp.float32)
        return theta * jnp.exp(grown[t - 1]), 1.0


_ACTIVATIONS = {"tanh": jnp.tanh, "silu": jax.nn.silu}
