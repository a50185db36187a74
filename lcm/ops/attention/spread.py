"""Attention over a sequence that lies on the mesh axis `context`, as four exchanges.

    gather      every device gets all keys and values, its own queries meet them at once
    neighbours  as gather, of the keys that a sliding window reaches; for tokens in their own order
    ring        keys and values go round, one shard a step; partial results are merged (Liu et al.,
                arXiv:2310.01889)
    ulysses     sequence shards are exchanged for shards of heads, and back (Jacobs et al.,
                arXiv:2309.14509)

Positions and segments go with their keys, and masks and encodings read only those, so the order of
tokens over the shards is free. In the order of the text a causal ring keeps the first device idle
and the last one busy; zigzag (chunks i and 2n - 1 - i on device i, as Llama 3, arXiv:2407.21783)
and striped order (every n-th token, arXiv:2311.09431) give each step the same work.

The backward pass of gather and ring keeps a device's own queries, keys, values and result, never
those of others: keys are exchanged once more, and as the final log-sum-exp is known, each shard's
gradient is one backward pass over it, with no second forward pass:

    p = exp(s - lse)      ds = p (do v^T - sum_k do o + dlse)      for any subset of the keys
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lcm.ops.attention.mask import Mask, reaches
from lcm.ops.attention.part import Part, Partial, merge
from lcm.ops.attention.score import Leaves, split
from lcm.ops.attention.sharded import HEADS, Later, cut_of_heads
from lcm.ops.placed import CONTEXT, axes_in_use, axes_of_rows, shards
from lcm.types import Array, Context, Values

METHODS = ("auto", "gather", "ring", "ulysses")
ORDERS = ("plain", "zigzag", "striped")

# Bytes of gathered keys and values of one layer on one device up to which `auto` gathers them:
# one exchange at once, that no step waits for. Beyond, a ring needs only two shards of them.
GATHERED = 256 << 20


@dataclasses.dataclass(frozen=True)
class Spread:
    """How attention goes over the axis `context`, and in which order tokens lie on it.

    Without that axis in the mesh in use, or where its size does not divide the tokens, it does
    nothing.
    """

    how: str = "auto"
    order: str = "plain"

    def __post_init__(self):
        for name, value, known in (("how", self.how, METHODS), ("order", self.order, ORDERS)):
            if value not in known:
                raise ValueError(f"Spread({name}={value!r}) is unknown: use {', '.join(known)}")

    @property
    def shuffled(self) -> bool:
        """Whether tokens lie in another order than that of the text."""
        return self.order != "plain" and shards() > 1


Run = Callable[[tuple[Part, ...], Array, Context, Context, float], Partial]
Known = Callable[[tuple[Part, ...], Array, Context, Context, float, Partial], Partial]


def applies(parts: tuple[Part, ...], slots: int) -> bool:
    """Whether the tokens lie in shards and attend to each other: as in training, not to a cache.

    Block maps count slots of the whole sequence: they are left to XLA, which gathers.
    """
    count, length = shards(), parts[0].q_BLHK.shape[1]
    whole = all(part.blocks is None for part in parts)
    return count > 1 and length == slots and length % count == 0 and whole


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known before tracing. `which`: the keys, of those that travel, of each part."""

    run: Run
    known: Known | None
    which: tuple[int, ...]
    parts: tuple[Any, ...]  # masks
    mods: Leaves
    scale: float
    shards: int
    row: tuple[int, int] | None  # as a `Part` has it

    def of(self, q: tuple, weights: tuple, keys: tuple, constants: tuple) -> tuple[Part, ...]:
        mods = self.mods.join(weights, constants)
        given = zip(q, self.which, self.parts, mods, strict=True)
        return tuple(Part(q, keys[n], mask, mod, row=self.row) for q, n, mask, mod in given)


def attend(
    run: Run,
    known: Known | None,
    spread: Spread,
    parts: tuple[Part, ...],
    v_BSGK: Values,
    context: Context,
    scale: float,
) -> Partial:
    """`run` over the mesh: rows over `data` and `fsdp`, heads over `tensor`, tokens over `context`.

    run: of one device, `(parts, v, q_context, k_context, scale) -> Partial`.
    known: `run` where the result over all keys is known, for gradients; or None.

    Raises:
        ValueError: for `ulysses` of heads that the axis does not divide.
    """
    axes, count = axes_in_use(), shards()
    batch, length, heads, _ = parts[0].q_BLHK.shape
    kv_heads = v_BSGK.shape[2]
    cut = cut_of_heads(axes, heads, kv_heads)
    copies = max(1, cut // kv_heads)
    rows = axes_of_rows(axes, batch)
    on_device = batch // math.prod(axes[name] for name in rows or ())
    how = _chosen(spread, parts, v_BSGK, on_device, kv_heads * copies // cut)
    if how == "ulysses":
        check_heads(heads // cut, kv_heads * copies // cut, count)
    cells = PartitionSpec(rows, CONTEXT, HEADS if cut > 1 else None)
    places = PartitionSpec(rows, CONTEXT)
    keys = list({id(part.k_BSGK): part.k_BSGK for part in parts}.values())
    which = tuple(next(n for n, k in enumerate(keys) if k is part.k_BSGK) for part in parts)
    masks = tuple(part.mask for part in parts)

    def own(q: tuple, keys: tuple, v: Array, mods: tuple, where: Context, at: Array) -> Partial:
        first = jax.lax.axis_index(HEADS) * (heads // cut) if cut > 1 else 0
        if how == "ulysses":
            first = first + at[0] * (heads // cut // count)
        mods = tuple(mod and Later(mod, first) for mod in mods)
        leaves, weights, constants = split(mods)
        # Where tokens are in order kernels skip tiles by index, and so know how many.
        in_order = how == "neighbours" or (how == "ulysses" and spread.order == "plain")
        row = None if in_order else (length, count if spread.order == "striped" else 1)
        plan = _Plan(run, known, which, masks, leaves, scale, count, row)
        if how == "ulysses":
            return _ulysses(plan, spread, q, weights, (keys, v), (where, constants))
        if how == "neighbours":
            return _neighbours(plan, q, weights, (keys, v), (where, constants))
        exchange = _ring if how == "ring" else _gather
        return exchange(plan, q, weights, (keys, v), (where, constants))

    repeat = lambda x: jnp.repeat(x, copies, axis=2) if copies > 1 else x  # noqa: E731
    return jax.shard_map(
        own,
        in_specs=(cells, cells, cells, PartitionSpec(), places, PartitionSpec(CONTEXT)),
        out_specs=Partial(cells, cells),
        axis_names=set(axes),
        check_vma=False,  # kernels do not say over which axes their results vary
    )(
        tuple(part.q_BLHK for part in parts),
        tuple(map(repeat, keys)),
        repeat(v_BSGK),
        tuple(part.score_mod for part in parts),
        Context(*context),
        jnp.arange(count, dtype=jnp.int32),
    )


def check_heads(heads: int, kv_heads: int, count: int) -> None:
    """Raises a ValueError if `ulysses` cannot deal heads of a device to `count` of them."""
    for name, size in (("query", heads), ("key", kv_heads)):
        if size % count:
            raise ValueError(
                f"context attention 'ulysses' deals the {size} {name} heads of a device to "
                f"mesh.context={count} devices, which does not divide them: use 'ring' or "
                f"'gather', or a mesh.context that divides {math.gcd(heads, kv_heads)}"
            )


def reach(masks: tuple[Mask, ...]) -> int | None:
    """How many tokens back a query sees at most, in the order of the text; None without a limit."""
    below, above = reaches(masks)
    return None if below is None or above is None or above > 0 else -below


def _chosen(spread: Spread, parts: tuple[Part, ...], v: Array, batch: int, kv_heads: int) -> str:
    if spread.how != "auto":
        local = spread.how == "gather" and spread.order == "plain"
        return "neighbours" if local and _is_near(parts, v) else spread.how
    if spread.order == "plain" and _is_near(parts, v):
        return "neighbours"
    keys = len({id(part.k_BSGK) for part in parts}) + 1
    size = keys * batch * v.shape[1] * kv_heads * v.shape[3] * v.dtype.itemsize
    return "gather" if size <= GATHERED else "ring"


def _is_near(parts: tuple[Part, ...], v: Array) -> bool:
    """Whether windows reach less than half of the sequence, beyond which the ring is as good."""
    back = reach(tuple(part.mask for part in parts))
    return back is not None and 2 * back < v.shape[1]


# One call of attention over keys from elsewhere, and its gradient.


def _over(plan: _Plan, q: tuple, weights: tuple, kv: tuple, where: tuple, k_where: Any) -> Partial:
    (keys, v), (own, constants) = kv, where
    return plan.run(plan.of(q, weights, keys, constants), v, own, k_where, plan.scale)


def _pulled(
    plan: _Plan,
    q: tuple,
    weights: tuple,
    kv: tuple,
    where: tuple,
    k_where: Any,
    kept: Partial,
    d: Partial,
) -> tuple:
    """Gradients of queries, weights, keys and values by some of the keys.

    kept: the result over all keys, d: its gradient.
    """
    own, constants = where

    if plan.known is not None:

        def known(q: tuple, weights: tuple, kv: tuple) -> Partial:
            parts = plan.of(q, weights, kv[0], constants)
            return plan.known(parts, kv[1], own, k_where, plan.scale, kept)

        return jax.vjp(known, q, weights, kv)[1](d)

    # Through `merge`: out = sum_p w_p out_p, w_p = exp(lse_p - lse), of which this is one.
    again = lambda q, weights, kv: _over(plan, q, weights, kv, where, k_where)  # noqa: E731
    some, pull = jax.vjp(again, q, weights, kv)
    seen = some.lse_BLH > -jnp.inf
    share = jnp.where(seen, jnp.exp(jnp.where(seen, some.lse_BLH - kept.lse_BLH, 0)), 0)
    d_out = d.out_BLHK.astype(jnp.float32)
    moved = some.out_BLHK.astype(jnp.float32) - kept.out_BLHK.astype(jnp.float32)
    d_lse = share * ((d_out * moved).sum(-1) + d.lse_BLH)
    return pull(Partial((share[..., None] * d_out).astype(some.out_BLHK.dtype), d_lse))


# Gather.


def _gathered(x: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(plan: _Plan, q: tuple, weights: tuple, kv: tuple, where: tuple) -> Partial:
    return _over(plan, q, weights, _gathered(kv), where, _gathered(where[0]))


def _gather_forward(plan: _Plan, *given: tuple) -> tuple[Partial, tuple]:
    out = _gather(plan, *given)
    return out, (given, out)


def _gather_backward(plan: _Plan, kept: tuple, d: Partial) -> tuple:
    (q, weights, kv, where), out = kept
    everything = _gathered(kv), where, _gathered(where[0])
    d_q, d_weights, d_kv = _pulled(plan, q, weights, *everything, out, d)
    back = lambda x: jax.lax.psum_scatter(  # noqa: E731
        x.astype(jnp.float32), CONTEXT, scatter_dimension=1, tiled=True
    )
    d_kv = jax.tree.map(lambda d, x: back(d).astype(x.dtype), d_kv, kv)
    return d_q, d_weights, d_kv, None


_gather.defvjp(_gather_forward, _gather_backward)


# Ring.


def _next(x: Any, count: int) -> Any:
    """The shard of the device before."""
    ring = [(i, (i + 1) % count) for i in range(count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, CONTEXT, ring), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(plan: _Plan, q: tuple, weights: tuple, kv: tuple, where: tuple) -> Partial:
    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        kv, k_where, total = carry
        # Sent before it is used: nothing of this step waits for what comes, and the last round
        # brings each shard home.
        coming = _next((kv, k_where), plan.shards)
        some = _over(plan, q, weights, kv, where, k_where)
        return (*coming, merge(total, some)), None

    # A copy, as backends take one context for queries and keys as a sign of tokens in order.
    k_where = Context(*where[0])
    rows = q[0].shape[:3]
    total = Partial(jnp.zeros((*rows, kv[1].shape[-1])), jnp.full(rows, -jnp.inf))
    (_, _, total), _ = jax.lax.scan(step, (kv, k_where, total), None, length=plan.shards)
    return Partial(total.out_BLHK.astype(kv[1].dtype), total.lse_BLH)


def _ring_forward(plan: _Plan, *given: tuple) -> tuple[Partial, tuple]:
    out = _ring(plan, *given)
    return out, (given, out)


def _ring_backward(plan: _Plan, kept: tuple, d: Partial) -> tuple:
    """Keys go round once more, and their gradients, float32, with them until they are home."""
    (q, weights, kv, where), out = kept
    wide = lambda x: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), x)  # noqa: E731

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        kv, k_where, d_q, d_weights, d_kv = carry
        coming = _next((kv, k_where), plan.shards)
        more = _pulled(plan, q, weights, kv, where, k_where, out, d)
        add = lambda x, y: x + y.astype(x.dtype)  # noqa: E731
        d_q, d_weights, d_kv = jax.tree.map(add, (d_q, d_weights, d_kv), more)
        return (*coming, d_q, d_weights, _next(d_kv, plan.shards)), None

    start = kv, Context(*where[0]), wide(q), wide(weights), wide(kv)
    (_, _, *found), _ = jax.lax.scan(step, start, None, length=plan.shards)
    found = jax.tree.map(lambda d, x: d.astype(x.dtype), tuple(found), (q, weights, kv))
    return *found, None


_ring.defvjp(_ring_forward, _ring_backward)


# Neighbours.


def _neighbours(plan: _Plan, q: tuple, weights: tuple, kv: tuple, where: tuple) -> Partial:
    """Own keys behind those of the shards before that windows reach.

    Positions grow from token to token, so a window of positions is never wider in tokens. Before
    the first shard come zeros: segment 0, which no query sees.
    """
    local, back = q[0].shape[1], reach(plan.parts)
    seen = [(kv, where[0])]
    for hop in range(1, min(-(-back // local), plan.shards - 1) + 1):
        width = min(local, back - (hop - 1) * local)
        after = [(i, i + hop) for i in range(plan.shards - hop)]
        last = jax.tree.map(lambda x, w=width: x[:, -w:], (kv, where[0]))
        seen.append(jax.tree.map(lambda x, a=after: jax.lax.ppermute(x, CONTEXT, a), last))
    kv, k_where = jax.tree.map(lambda *x: jnp.concatenate(x, 1), *reversed(seen))
    return _over(plan, q, weights, kv, where, k_where)


# Ulysses.


def _ulysses(
    plan: _Plan, spread: Spread, q: tuple, weights: tuple, kv: tuple, where: tuple
) -> Partial:
    """All tokens of some heads."""
    deal = functools.partial(jax.lax.all_to_all, axis_name=CONTEXT, tiled=True)
    of_heads = lambda x: deal(x, split_axis=2, concat_axis=1)  # noqa: E731
    of_tokens = lambda x: deal(x, split_axis=1, concat_axis=2)  # noqa: E731
    q, kv = jax.tree.map(of_heads, (q, kv))
    own = _gathered(where[0])
    k_where = own if spread.order == "plain" else Context(*own)
    out = _over(plan, q, weights, kv, (own, where[1]), k_where)
    return jax.tree.map(of_tokens, out)
