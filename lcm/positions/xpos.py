"""xPos: rotation with exponential decay."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from lcm.errors import ConfigError
from lcm.ops.attention import Part
from lcm.positions import lengths
from lcm.positions.base import About, Dims, Params
from lcm.positions.rope import RoPE
from lcm.types import Array, Context, Keys, Queries


@dataclasses.dataclass(frozen=True)
class XPos(RoPE):
    """Pair i decays as `zeta_i^((m - n) / scale_base)` beside its rotation (arXiv:2212.10554).

    zeta_i = (2i/R + 0.4) / 1.4. Queries carry the power of m and keys its inverse, both counted
    from the middle of the document so that neither overflows; only differences matter, and only
    for keys before the query. Float32 up to about 80 `scale_base` tokens.
    """

    scale_base: float = 512.0

    cache: ClassVar = "raw"
    about: ClassVar = About(
        "xPos",
        "RoPE, pair i times ((2i/R + 0.4) / 1.4)^((m - n) / 512)",
        "Sun et al., ACL 2023, arXiv:2212.10554",
        "from scratch",
        "keys are rotated at every step",
    )

    def check(self, dims: Dims) -> None:
        super().check(dims)
        if self.scale_base <= 0:
            raise ConfigError(
                f"model.positions.scale_base={self.scale_base} must be above 0; the usual is 512"
            )

    def parts(
        self,
        params: Params,
        q_BLHK: Queries,
        k_BSGK: Keys,
        q_context: Context,
        k_context: Context,
    ) -> tuple[Part, ...]:
        q_length, k_length = lengths.both(q_context, k_context)
        return (
            Part(
                self._decayed(q_BLHK, q_context.positions_BL, q_length, 1),
                self._decayed(k_BSGK, k_context.positions_BL, k_length, -1),
            ),
        )

    def _decayed(
        self, x_BLHK: Queries, positions_BL: Array, length_BL: Array, sign: int
    ) -> Queries:
        rotated = self.rotated(x_BLHK.shape[-1])
        log_zeta = np.log((np.arange(0, rotated, 2) / rotated + 0.4) / 1.4)
        rest = np.zeros(x_BLHK.shape[-1] - rotated)
        rate = jnp.asarray(np.concatenate([log_zeta, log_zeta, rest]), jnp.float32)
        from_middle = (positions_BL - length_BL // 2)[:, :, None, None]
        decay = jnp.exp(sign * from_middle / self.scale_base * rate)
        turned = self.rotate(x_BLHK.astype(jnp.float32), positions_BL)
        return (turned * decay).astype(x_BLHK.dtype)
