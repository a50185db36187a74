"""What goes into an attention and what comes out of a piece of one, ready to be merged."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from lcm.ops.attention.blocks import BlockMap
from lcm.ops.attention.mask import Mask, causal, visible
from lcm.ops.attention.score import ScoreMod
from lcm.types import Array, Context, Keys, Queries

LogSums = Float[Array, "B L H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Rotated queries and keys with the keys they may see; the mask is static under `jax.jit`.

    A key is seen if the mask, the segments and, where there is one, the block map show it.

    row: where these are a shard of a row, its tokens and the distance in it of neighbours in the
        shard; for estimates of work alone.
    """

    q_BLHK: Queries
    k_BSGK: Keys
    mask: Mask = dataclasses.field(default=causal(), metadata={"static": True})
    score_mod: ScoreMod | None = None
    blocks: BlockMap | None = None
    row: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})

    def sees(self, q_context: Context, k_context: Context, q_slots: Array) -> Array:
        """Dense bool `[B, H or 1, L, S]`: what the queries at `q_slots` see of the keys."""
        seen = visible(self.mask, q_context, k_context)[:, None]
        if self.blocks is None:
            return seen
        return seen & self.blocks.shows(q_slots, self.k_BSGK.shape[1])


class Partial(NamedTuple):
    """Attention over some keys: `out = sum_j exp(s_j - lse) v_j`, `lse = log sum_j exp(s_j)`.

    out: in the dtype of the values, 0 for a query that sees none of the keys.
    lse: float32, -inf for such a query. (0, -inf) is what `merge` leaves everything unchanged by.
    """

    out_BLHK: Queries
    lse_BLH: LogSums


def merge(*partials: Partial) -> Partial:
    """Attention over the union of keys: one softmax, in any order and grouping.

        lse = log sum_p exp(lse_p),  out = sum_p exp(lse_p - lse) out_p

    Sums are float32; the result has the widest dtype given, so a float32 `out` carried through a
    loop is rounded once, at its end. Gradients pass through `out` and `lse`; rows that see no key
    give and take none.
    """
    if not partials:
        raise ValueError("merge needs at least one partial")
    if len(partials) == 1:
        return partials[0]
    lses = [lse for _, lse in partials]
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, lses))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = [jnp.exp(lse - top) for lse in lses]
    total = sum(weights)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    parts = zip(partials, weights, strict=True)
    out = sum((w / total)[..., None] * out.astype(jnp.float32) for (out, _), w in parts)
    dtype = jnp.result_type(*(out for out, _ in partials))
    return Partial(out.astype(dtype), jnp.where(some, top + jnp.log(total), -jnp.inf))
