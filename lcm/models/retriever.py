"""A text as one vector: the last layer's output at its last token.

Mamba Retriever (Zhang et al., 2024, arXiv:2408.08066): a decoder reads a text and an EOS, and the
vector is what it has there; queries and passages share it, and are compared by cosine. Any mixers
serve. What is padded on the right is behind the EOS, which no vector depends on. In both directions
(layers by turns, arXiv:2402.05892) it is still the EOS's.
"""

import dataclasses

import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.models import decoder
from lcm.models.encoder import check_counts, encode_tokens, rows
from lcm.models.spec import ModelSpec
from lcm.ops.contrastive import info_nce, unit
from lcm.types import Array, Tokens


@dataclasses.dataclass(frozen=True)
class RetrieverSpec:
    """An encoder of texts, and the temperature its cosines are trained at.

    The paper does not state it; 0.01 is customary.

    Raises:
        ConfigError: for a temperature that is not more than 0.
    """

    encoder: ModelSpec
    both_directions: bool = False
    temperature: float = 0.01

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"temperature {self.temperature} must be more than 0, such as 0.01")


def embed(spec: RetrieverSpec, params: decoder.Params, tokens_BL: Tokens, count_B: Array) -> Array:
    """Unit vectors of rows whose last of `count_B` tokens (1 or more) is EOS, float32 `[B, D]`.

    Raises:
        ValueError: for tokens and counts that do not go together.
    """
    check_counts(tokens_BL, count_B, 1)
    grid = (tokens_BL.shape[1],) if spec.both_directions else ()
    x_BLD = encode_tokens(spec.encoder, params, tokens_BL, rows(tokens_BL, count_B), grid)
    return unit(x_BLD[jnp.arange(len(x_BLD)), count_B - 1])


def loss(
    spec: RetrieverSpec,
    params: decoder.Params,
    queries: tuple[Tokens, Array],
    passages: tuple[Tokens, Array],
    hard: tuple[Tokens, Array] | None = None,
) -> Array:
    """InfoNCE of each query, `[B]`: rows and counts, hard negatives as `[B, M, L]` and `[B, M]`."""
    q_BD, p_BD = (embed(spec, params, *texts) for texts in (queries, passages))
    if hard is None:
        return info_nce(q_BD, p_BD, temperature=spec.temperature)
    tokens_BML, count_BM = hard
    flat_ND = embed(spec, params, tokens_BML.reshape(-1, tokens_BML.shape[-1]), count_BM.ravel())
    hard_BMD = flat_ND.reshape(*count_BM.shape, -1)
    return info_nce(q_BD, p_BD, hard_BMD, temperature=spec.temperature)
