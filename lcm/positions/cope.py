"""CoPE: positions counted by content."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.ops.attention import Part
from lcm.ops.attention.reference import scores
from lcm.positions.base import About, Dims, Limit, Params, PositionEncoding
from lcm.positions.rows import in_rows
from lcm.types import Array, Context, Keys, Queries, Values

QUERIES = 128  # whose scores are in memory at once


@dataclasses.dataclass(frozen=True)
class CoPE(PositionEncoding):
    """Contextual position encoding (Golovneva et al., 2024, arXiv:2405.18719).

        g_ij = sigmoid(s_ij),   p_ij = min(sum_{t = j .. i} g_it, P - 1),   s_ij = q_i k_j / sqrt(K)
        score  s_ij + (p - floor p) q_i e[ceil p] + (1 - p + floor p) q_i e[floor p]

    The table e, P x K, is shared by heads, one in each layer, and begins at 0. A position needs
    all scores after it, so there is no block-wise form: rows of queries are computed against all
    keys, and again in the backward pass. Keys must lie in the order of their positions.

    positions: P, the largest count plus 1.
    """

    positions: int = 64

    about: ClassVar = About(
        "CoPE",
        "s_ij + q_i e(p_ij), p_ij = sum of sigmoid(s_it), t = j .. i",
        "Golovneva et al., 2024, arXiv:2405.18719",
        "from scratch",
        "dense rows of scores: no kernel, no skipping",
    )

    def check(self, dims: Dims) -> None:
        if self.positions < 2:
            raise ConfigError(
                f"model.positions.positions={self.positions} leaves nothing to interpolate: "
                "give at least 2"
            )

    def init_layer(self, key: jax.Array, dims: Dims) -> Params:
        return {"table": jnp.zeros((self.positions, dims.head_size))}

    def attend(
        self,
        params: Params,
        q_BLHK: Queries,
        k_BSGK: Keys,
        v_BSGK: Values,
        q_context: Context,
        k_context: Context,
        *,
        limit: Limit = lambda part: part,
        **options: Any,
    ) -> Queries:
        v = v_BSGK.transpose(0, 2, 1, 3)

        @jax.checkpoint
        def rows(q: Array, where: Context) -> Array:
            part = limit(Part(q, k_BSGK))
            return _rows(part, q, params["table"], v, where, k_context)

        return in_rows(rows, q_BLHK, q_context, QUERIES)


def _rows(
    part: Part, q_BLHK: Array, table: Array, v: Array, q_context: Context, k_context: Context
) -> Array:
    batch, length, heads, size = q_BLHK.shape
    seen = part.sees(q_context, k_context, jnp.arange(length))
    score = scores(part, q_context, k_context, size**-0.5)
    gates = jnp.where(seen, jax.nn.sigmoid(score), 0.0)
    places = jnp.cumsum(gates[..., ::-1], axis=-1)[..., ::-1]
    places = jnp.minimum(places, len(table) - 1)
    q = q_BLHK.transpose(0, 2, 1, 3).astype(jnp.float32)
    by_place = q @ table.astype(jnp.float32).T
    below = jnp.floor(places)
    at = lambda n: jnp.take_along_axis(by_place, n.astype(jnp.int32), axis=-1)  # noqa: E731
    part_above = places - below
    score = score + part_above * at(jnp.ceil(places)) + (1 - part_above) * at(below)
    some = seen.any(-1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(seen, score, jnp.where(some, -jnp.inf, 0.0)), axis=-1)
    weights = jnp.where(some, weights, 0.0).astype(v.dtype)
    shape = batch, v.shape[1], -1, v.shape[2]
    out = jnp.einsum(
        "bgms,bgsk->bgmk", weights.reshape(shape), v, preferred_element_type=jnp.float32
    )
    return out.reshape(batch, heads, length, -1).transpose(0, 2, 1, 3).astype(v.dtype)
