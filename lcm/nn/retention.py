"""Linear attention and retention as mixers: what was written stays, or fades at a fixed rate."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.nn.linear import LinearMixer, Projected
from lcm.nn.spec import LayerSpec
from lcm.positions import RoPE
from lcm.types import Array

EPS = 1e-6  # of the normaliser


class LinearAttention(LinearMixer):
    """Linear attention (Katharopoulos et al., arXiv:2006.16236) with phi(x) = elu(x) + 1.

        S_t = S_{t-1} + phi(k_t) v_t^T             y_t = S_t^T phi(q_t)

    The paper divides y_t by n_t . phi(q_t), n being the sum of phi(k): `normaliser=True`. Later
    work leaves that to the norm behind it, as is the default here.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"normaliser": False}

    def mix(self, given: Projected) -> tuple[Array, Any]:
        q, k = (jax.nn.elu(x) + 1 for x in (given.q_BLGN, given.k_BLGN))
        decay_BLH = jnp.zeros(given.v_BLHP.shape[:3])
        if not self.spec.option("normaliser"):
            return self.run(given, q, k, given.v_BLHP, decay_BLH, given.memory)
        y_BLHP, memory = self.run(given, q, k, counted(given), decay_BLH, given.memory)
        return y_BLHP[..., :-1] / (y_BLHP[..., -1:] + EPS), memory

    @staticmethod
    def memory(spec: LayerSpec) -> Any:
        return spec.heads, spec.state, spec.head_size + spec.option("normaliser")


class RetNet(LinearMixer):
    """Multi-scale retention (Sun et al., arXiv:2307.08621), equations 5 to 8.

        S_t = gamma_h S_{t-1} + rot(k_t) v_t^T     y_t = S_t^T rot(q_t) / sqrt N

    Queries and keys turn with their position as in RoPE. gamma_h = 1 - 2^(-5-h) for h = 0 .. H - 1
    (`decay=powers`, the paper); `decay=range` has 1 - gamma spaced evenly in logarithm from 1 / 32
    to 1 / 512, as the authors' code.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"decay": "powers"}

    @staticmethod
    def check(spec: LayerSpec) -> None:
        """Refuses rules of decay that there are not, and a state without pairs."""
        log_decays(spec)
        if spec.state % 2:
            raise ConfigError(
                f"model.state={spec.state} is odd, and RetNet turns its numbers in pairs: take "
                f"{spec.state + 1}"
            )

    def mix(self, given: Projected) -> tuple[Array, Any]:
        rope = RoPE()
        at_BL, q = given.context.positions_BL, given.q_BLGN * self.spec.state**-0.5
        q, k = (rope.rotate(x, at_BL) for x in (q, given.k_BLGN))
        decay_BLH = jnp.broadcast_to(log_decays(self.spec), given.v_BLHP.shape[:3])
        return self.run(given, q, k, given.v_BLHP, decay_BLH, given.memory)


def log_decays(spec: LayerSpec) -> Array:
    """`log gamma` of each head of RetNet, `[H]`.

    Raises:
        ConfigError: for a rule that there is not.
    """
    rule = spec.option("decay")
    if rule == "powers":
        return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(spec.heads))))
    if rule == "range":
        return jnp.log1p(-jnp.exp(jnp.linspace(jnp.log(1 / 32), jnp.log(1 / 512), spec.heads)))
    raise ConfigError(f"model.options decay={rule!r} is no rule of RetNet: take powers or range")


def counted(given: Projected) -> Array:
    """Values with one more channel that counts what is written: 1, and 0 of padding."""
    ones = given.there(jnp.ones_like(given.v_BLHP[..., :1]))
    return jnp.concatenate([given.v_BLHP, ones], -1)
