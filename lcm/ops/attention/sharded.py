"""Attention of each device over its own rows and heads, for kernels that XLA cannot partition."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lcm.ops.attention.part import Part, Partial
from lcm.ops.attention.score import ScoreMod
from lcm.ops.placed import axes_in_use, axes_of_rows
from lcm.types import Array, Context, Values

HEADS = "tensor"  # the axis of a mesh, as `lcm.parallel` names it, that heads lie on

Attend = Callable[[tuple[Part, ...], Values, Context, Context, float], Partial]


def over_mesh(attend: Attend) -> Attend:
    """`attend` in a `jax.shard_map` where a mesh is in use, the same function where none is.

    Rows are cut over `data` and `fsdp`, heads over `HEADS`, each if it divides; what is not cut,
    such as the sequence over other axes, is gathered, and computed by each device. Where there are
    fewer key heads than devices along `HEADS`, each device has a copy of the one its queries share.
    """

    def call(
        parts: tuple[Part, ...],
        v_BSGK: Values,
        q_context: Context,
        k_context: Context,
        scale: float,
    ) -> Partial:
        axes = axes_in_use()
        if math.prod(axes.values()) == 1:
            return attend(parts, v_BSGK, q_context, k_context, scale)
        batch, _, heads, _ = parts[0].q_BLHK.shape
        cut = cut_of_heads(axes, heads, v_BSGK.shape[2])
        copies = max(1, cut // v_BSGK.shape[2])
        cells = PartitionSpec(axes_of_rows(axes, batch), None, HEADS if cut > 1 else None)
        places = PartitionSpec(cells[0])
        one_context = q_context is k_context

        def own(own_parts: tuple, v: Array, q_where: Context, k_where: Context) -> Partial:
            first = jax.lax.axis_index(HEADS) * (heads // cut) if cut > 1 else 0
            local = tuple(
                Part(q, k, part.mask, mod and Later(mod, first), blocks)
                for part, (q, k, mod, blocks) in zip(parts, own_parts, strict=True)
            )
            return attend(local, v, q_where, q_where if one_context else k_where, scale)

        spread = lambda x: jnp.repeat(x, copies, axis=2) if copies > 1 else x  # noqa: E731
        pieces = tuple((cells, cells, PartitionSpec(), _map_heads(part, cells)) for part in parts)
        return jax.shard_map(
            own,
            in_specs=(pieces, cells, places, places),
            out_specs=Partial(cells, cells),
            axis_names=set(axes),
            check_vma=False,  # kernels do not say over which axes their results vary
        )(
            tuple((p.q_BLHK, spread(p.k_BSGK), p.score_mod, p.blocks) for p in parts),
            spread(v_BSGK),
            q_context,
            k_context,
        )

    return call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Later:
    """A modification whose heads are counted from `first`."""

    mod: ScoreMod
    first: Array | int

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return self.mod(score, q_pos, k_pos, head + self.first)


def _map_heads(part: Part, cells: PartitionSpec) -> PartitionSpec:
    """A block map with heads of its own is cut as they are."""
    own = part.blocks is not None and part.blocks.indices_HQN.shape[0] > 1
    return PartitionSpec(cells[2] if own else None)


def cut_of_heads(axes: dict[str, int], heads: int, kv_heads: int) -> int:
    """Over how many devices heads are cut."""
    count = axes.get(HEADS, 1)
    fits = heads % count == 0 and (kv_heads % count == 0 or count % kv_heads == 0)
    return count if fits else 1
