"""The linear recurrent unit as a mixer."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lcm.errors import ConfigError
from lcm.nn.lti import DiagonalSystem
from lcm.nn.spec import LayerSpec
from lcm.types import Array


class LRU(DiagonalSystem):
    """Orvieto et al., arXiv:2303.06349, with P = expand D complex states.

        a = exp(-exp(nu_log) + i exp(theta_log))        s = exp(gamma_log)
        h_t = a h_{t-1} + s (B x_t)                     y_t = Re(C h_t) + D x_t

    Then a GLU. `|a|^2` begins uniform from r_min^2 to r_max^2, the phase uniform from 0 to `phase`,
    and s as sqrt(1 - |a|^2), with which white noise keeps its variance.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"r_min": 0.0, "r_max": 1.0, "phase": 6.283185307179586}
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        "r_min": (0, 1),
        "r_max": (0, 1),
        "phase": (1e-6, 6.2831854),
    }

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, size = spec, self.size(spec)
        low, high = spec.option("r_min") ** 2, spec.option("r_max") ** 2
        uniform = lambda: jax.random.uniform(rngs.params(), (size,), minval=1e-5, maxval=1 - 1e-5)  # noqa: E731
        square = uniform() * (high - low) + low
        self.nu_log = nnx.Param(jnp.log(-0.5 * jnp.log(square)))
        self.theta_log = nnx.Param(jnp.log(spec.option("phase") * uniform()))
        self.gamma_log = nnx.Param(0.5 * jnp.log1p(-square))
        normal = lambda *shape: jax.random.normal(rngs.params(), shape)  # noqa: E731
        self.B = nnx.Param(normal(spec.width, 2 * size) * (2 * spec.width) ** -0.5)
        self.C = nnx.Param(normal(2 * size, spec.width) * size**-0.5)
        self.D = nnx.Param(normal(spec.width))
        self.add_output(spec, rngs)

    @staticmethod
    def check(spec: LayerSpec) -> None:
        """Refuses a ring that has no width."""
        low, high = spec.option("r_min"), spec.option("r_max")
        if low >= high:
            raise ConfigError(
                f"model.options has r_min={low} and r_max={high}, a ring without width: r_min must "
                "be less, such as r_min=0.9,r_max=0.999"
            )

    @classmethod
    def size(cls, spec: LayerSpec) -> int:
        return spec.inner

    def rates(self) -> tuple[Array, Array]:
        exponent = jax.lax.complex(-jnp.exp(self.nu_log[...]), jnp.exp(self.theta_log[...]))
        return jnp.exp(exponent), jnp.exp(self.gamma_log[...])
