"""ReAttention: full attention over a few keys that are chosen without positions."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.ops import attention
from lcm.ops.attention import Part
from lcm.positions import lengths
from lcm.positions.base import About, Dims, Limit, Params
from lcm.positions.remap import Remap
from lcm.positions.rope import RoPE
from lcm.positions.rows import in_rows
from lcm.types import Array, Context, Keys, Queries, Values


@dataclasses.dataclass(frozen=True)
class ReAttention(Remap):
    """Sinks, chosen spans and the latest keys, numbered anew from 0 (LongCache, arXiv:2407.15176).

    For each `chunk` of queries, of the keys between the first `sinks` and the last `local`: each
    query of each head names its `top` best by q k without rotation; the `clip` most named are
    widened to spans of `span` keys. All heads of a layer share the choice. The queries then attend
    to sinks, spans and local keys as if they followed each other, so no position is larger than
    sinks + clip span + local, whatever the document's length.

    In a chunk early queries see spans that later ones chose; chunk = 1 has none of that. Keys that
    are not chosen are masked out here, not left out of memory.

    local: 0 takes what the trained length leaves beside sinks and spans.
    """

    rope: RoPE = RoPE()  # noqa: RUF009, frozen
    sinks: int = 32
    local: int = 0
    top: int = 4
    clip: int = 127
    span: int = 32
    chunk: int = 512
    original: int = 0

    about: ClassVar = About(
        "ReAttention (LongCache)",
        "RoPE over [sinks, spans of the best q k, last keys], positions 0, 1, ...",
        "Liu et al., ICLR 2025, arXiv:2407.15176",
        "none",
        "scores of all keys, twice",
    )

    def resolved(self, dims: Dims) -> "ReAttention":
        own = super().resolved(dims)
        left = own.original - own.sinks - own.clip * own.span
        return dataclasses.replace(own, local=own.local or left)

    def check(self, dims: Dims) -> None:
        self.rope.check(dims)
        if min(self.sinks, self.top, self.clip) < 0 or self.span < 2 or self.chunk < 1:
            raise ConfigError(
                f"model.positions.sinks={self.sinks}, top={self.top} and clip={self.clip} must not "
                f"be negative, span={self.span} at least 2 and chunk={self.chunk} at least 1"
            )
        if self.local < self.chunk:
            raise ConfigError(
                f"model.positions.local={self.local} latest keys are fewer than the "
                f"chunk={self.chunk} queries that share a choice: lower chunk, or sinks + clip x "
                f"span = {self.sinks + self.clip * self.span}, which the trained length "
                f"{dims.length} must hold as well"
            )

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
        def chunk(q: Array, where: Context) -> Array:
            kept, q_pos, k_pos = self.chosen(q, k_BSGK, where, k_context)
            part = Part(
                self.rope.rotate(q, q_pos, self.trained, params),
                self.rope.rotate(k_BSGK, k_pos, self.trained, params),
                attention.causal(),
            )
            shown = k_context._replace(segments_BL=jnp.where(kept, k_context.segments_BL, 0))
            return attention.attend([limit(part)], v_BSGK, where, shown, **options)

        return in_rows(chunk, q_BLHK, q_context, self.chunk)

    def chosen(
        self, q_BLHK: Queries, k_BSGK: Keys, q_context: Context, k_context: Context
    ) -> tuple[Array, Array, Array]:
        """Keys that a chunk keeps, bool `[B, S]`, and positions of queries and of kept keys."""
        k_pos, k_seg = k_context.positions_BL, k_context.segments_BL
        n = lengths.lengths(k_context, q_context)  # of each key's document, up to this chunk
        there = (k_seg > 0) & (k_pos < n)
        middle = there & (k_pos >= self.sinks) & (k_pos < n - self.local)
        kept = (there & ~middle) | self._spans(q_BLHK, k_BSGK, q_context, k_context, middle)
        rank, count = jax.vmap(_ranks)(k_seg, k_pos, kept)
        shown = k_context._replace(
            positions_BL=jnp.where(kept, count - 1, -1), segments_BL=jnp.where(kept, k_seg, 0)
        )
        kept_of_query = lengths.lengths(q_context, shown)
        behind = lengths.lengths(q_context, q_context) - 1 - q_context.positions_BL
        return kept, kept_of_query - 1 - behind, rank

    def _spans(
        self, q_BLHK: Array, k_BSGK: Array, q_context: Context, k_context: Context, middle: Array
    ) -> Array:
        """Keys of the middle within spans of the most named ones, bool `[B, S]`."""
        batch, length, heads, size = q_BLHK.shape
        slots, kv_heads = k_BSGK.shape[1:3]
        top, clip = min(self.top, slots), min(self.clip, slots)
        if not top or not clip:
            return jnp.zeros_like(middle)
        q = jax.lax.stop_gradient(q_BLHK).transpose(0, 2, 1, 3).reshape(batch, kv_heads, -1, size)
        k = jax.lax.stop_gradient(k_BSGK).transpose(0, 2, 1, 3)
        score = jnp.einsum("bgmk,bgsk->bgms", q, k, preferred_element_type=jnp.float32)
        score = score.reshape(batch, heads, length, slots)
        same = q_context.segments_BL[:, :, None] == k_context.segments_BL[:, None]
        allowed = (same & middle[:, None])[:, None]
        best, at = jax.lax.top_k(jnp.where(allowed, score, -jnp.inf), top)
        rows = jnp.arange(batch)[:, None]
        named = jnp.zeros((batch, slots), jnp.int32)
        named = named.at[rows, at.reshape(batch, -1)].add((best > -jnp.inf).reshape(batch, -1))
        times, centres = jax.lax.top_k(named, clip)
        some = (times > 0).astype(jnp.int32)
        edges = jnp.zeros((batch, slots + 1), jnp.int32)
        edges = edges.at[rows, jnp.maximum(centres - self.span // 2, 0)].add(some)
        edges = edges.at[rows, jnp.minimum(centres + (self.span + 1) // 2, slots)].add(-some)
        return (jnp.cumsum(edges[:, :slots], 1) > 0) & middle


def _ranks(segments_S: Array, positions_S: Array, kept_S: Array) -> tuple[Array, Array]:
    """The number of each kept key among those of its document, and how many those are."""
    hidden = jnp.where(kept_S, segments_S, jnp.iinfo(jnp.int32).max)
    slots = jnp.arange(len(hidden), dtype=jnp.int32)
    segments, _, order = jax.lax.sort((hidden, positions_S, slots), num_keys=2)
    first = jnp.searchsorted(segments, segments, side="left")
    last = jnp.searchsorted(segments, segments, side="right")
    at = jnp.zeros_like(order).at[order]
    return at.set(slots - first.astype(jnp.int32)), at.set((last - first).astype(jnp.int32))
