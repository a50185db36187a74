"""Attention with linear biases."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp

from lcm.ops.attention import LinearBias, Part
from lcm.positions.base import About, Params, PositionEncoding
from lcm.types import Context, Keys, Queries


@dataclasses.dataclass(frozen=True)
class ALiBi(PositionEncoding):
    """`-m_h (i - j)` added to the scores of head h (Press et al., ICLR 2022, arXiv:2108.12409)."""

    about: ClassVar = About(
        "ALiBi",
        "score - m_h (i - j), m_h = 2^(-8h/H)",
        "Press et al., ICLR 2022, arXiv:2108.12409",
        "from scratch",
    )

    def parts(
        self,
        params: Params,
        q_BLHK: Queries,
        k_BSGK: Keys,
        q_context: Context,
        k_context: Context,
    ) -> tuple[Part, ...]:
        slopes_H = jnp.asarray(slopes(q_BLHK.shape[2]), jnp.float32)
        return (Part(q_BLHK, k_BSGK, score_mod=LinearBias(slopes_H)),)


def slopes(heads: int) -> list[float]:
    """m_h = 2^(-8h/H) for H a power of two.

    Otherwise those of the largest power of two P below H, then the 1st, 3rd, 5th ... of 2P.
    """
    power = 2 ** int(math.log2(heads))
    geometric = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power, 2)]
    return geometric + between[: heads - power]
