"""S5 as a mixer: one state-space system of all channels."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcm.errors import ConfigError
from lcm.nn.lti import DiagonalSystem, held
from lcm.nn.spec import LayerSpec
from lcm.types import Array

STABLE = -1e-4  # largest real part of a rate, for states that stay finite at any length


class S5(DiagonalSystem):
    """Smith et al., arXiv:2208.04933, with E = expand D numbers kept as E / 2 conjugate pairs.

        rate = min(A_re, -1e-4) + i A_im        dt = step exp(dt_log), one a state
        a = exp(rate dt)                        s = (a - 1) / rate
        h_t = a h_{t-1} + s (B x_t)             y_t = 2 Re(C h_t) + D x_t

    Then a GLU. Rates begin as those of HiPPO-LegS without its part of rank 1, and B and C in its
    eigenvectors; the factor 2 is in the values of C. Option `step` rescales the time that a token
    takes: 0.5 reads rows of twice the rate.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"step": 1.0}
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {"step": (1e-6, 1e6)}

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.spec, width, whole = spec, spec.width, spec.inner
        rate, vectors = hippo(whole)
        self.A_re = nnx.Param(jnp.asarray(rate.real, jnp.float32))
        self.A_im = nnx.Param(jnp.asarray(rate.imag, jnp.float32))
        low, high = np.log(1e-3), np.log(1e-1)
        log = jax.random.uniform(rngs.params(), (len(rate),), minval=low, maxval=high)
        self.dt_log = nnx.Param(log)
        normal = lambda *shape: jax.random.normal(rngs.params(), shape)  # noqa: E731
        # V^-1 is the conjugate transpose: B x = V^-1 (B x) of a real B, and C = C V.
        real = normal(width, whole) * width**-0.5
        self.B = nnx.Param(jnp.concatenate([real @ vectors.real, -(real @ vectors.imag)], 1))
        real = 2 * normal(width, whole) * whole**-0.5
        self.C = nnx.Param(jnp.concatenate([real @ vectors.real, -(real @ vectors.imag)], 1).T)
        self.D = nnx.Param(normal(width))
        self.add_output(spec, rngs)

    @staticmethod
    def check(spec: LayerSpec) -> None:
        """Refuses what is no number of pairs."""
        if spec.inner % 2:
            raise ConfigError(
                f"model.expand={spec.expand:g} of model.width={spec.width} gives S5 {spec.inner} "
                "numbers, which are no pairs: choose an expand that makes them even"
            )

    @classmethod
    def size(cls, spec: LayerSpec) -> int:
        return spec.inner // 2

    def rates(self) -> tuple[Array, Array]:
        rate = jax.lax.complex(jnp.minimum(self.A_re[...], STABLE), self.A_im[...])
        a_P, less_P = held(rate * jnp.exp(self.dt_log[...]) * self.spec.option("step"))
        return a_P, less_P / rate


def hippo(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues with positive imaginary part, and their vectors `[N, N / 2]`, of the normal part
    of HiPPO-LegS: -1/2 and a skew matrix."""
    root = np.sqrt(1 + 2 * np.arange(size))
    lower = np.tril(np.outer(root, root), -1) / 2
    imaginary, vectors = np.linalg.eigh(-1j * (lower.T - lower))
    return -0.5 + 1j * imaginary[size // 2 :], vectors[:, size // 2 :]
