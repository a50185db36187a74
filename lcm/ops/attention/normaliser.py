"""How scores become weights: softmax, softmax with a sink, softplus with re-weighting."""

import dataclasses

import jax
import jax.numpy as jnp

from lcm.ops.attention.part import Partial
from lcm.types import Array


@dataclasses.dataclass(frozen=True)
class Softmax:
    """`exp(s_j) / sum_j exp(s_j)`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxSink:
    """`exp(s_j) / (exp(sink_h) + sum_j exp(s_j))`: a head may attend to nothing.

    The sink is one more key of value 0 whose score is learned per head (gpt-oss, arXiv:2508.10925).
    It belongs to one of the partials of a `merge`, not to each.
    """

    sink_H: Array

    def partial(self, like: Partial) -> Partial:
        """The attention that sees the sink alone."""
        sink = jnp.asarray(self.sink_H, jnp.float32)
        if sink.shape != like.lse_BLH.shape[-1:]:
            raise ValueError(
                f"sink_H has shape {sink.shape}: it must have one logit for each of the "
                f"{like.lse_BLH.shape[-1]} heads"
            )
        return Partial(jnp.zeros_like(like.out_BLHK), jnp.broadcast_to(sink, like.lse_BLH.shape))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softplus:
    """Softplus attention with re-weighting, LSSAR (arXiv:2501.13428, the version trained with it).

    For N visible keys, head size d and queries and keys of length 1:

        a_j = softplus(log d log N q k_j),   A_j = a_j / sum_j a_j                      (LSSA)
        R_j = relu(N A_j - O)^power,         weights R_j / sum_j R_j,   O = 1 if N > 3 else 0

    The mean of N A_j is 1, so only keys above the average stay. A row where none is above it by
    more than 1e-5, such as one of equal keys, keeps A. Score modifications act before the softplus.

    power: 15 carries furthest, 3 was best at the training length; None leaves out re-weighting.
    """

    power: float | None = dataclasses.field(default=15.0, metadata={"static": True})

    def __post_init__(self):
        if self.power is not None and self.power < 1:
            raise ValueError(f"Softplus(power={self.power}): the power must be at least 1, or None")


Normaliser = Softmax | SoftmaxSink | Softplus
SOFTMAX = Softmax()
