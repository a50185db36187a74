"""Masks as intervals of key positions: linear in length, composable, hashable.

A mask says for each query position which key positions it may see: `lower(q) <= k <= upper(q)`.
Intersections of intervals are intervals, so masks compose with `&`; a bound with one side can be
turned round with `~`. Queries see keys of their own segment only, whatever the mask: that is not a
choice of the caller.

    causal() & window(1024)                            # sliding window
    causal() & sinks(4) & ~window(1024)                # the far part of LM-Infinite
"""

import dataclasses

import jax.numpy as jnp

from lcm.types import Array, Context, PerToken

# Outside every position in use, with room to add to either without overflow of int32.
FAR = 1 << 30


@dataclasses.dataclass(frozen=True)
class Bound:
    """One condition on key positions; `None` leaves that side open."""

    def lower(self, q: Array) -> Array | None:
        """Smallest visible key position for each query position."""
        return None

    def upper(self, q: Array) -> Array | None:
        """Largest visible key position for each query position."""
        return None

    def reach(self) -> tuple[int | None, int | None]:
        """Smallest and largest `k - q` that can be visible, for every q; `None` without a limit."""
        return None, None


@dataclasses.dataclass(frozen=True)
class _Sized(Bound):
    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(
                f"{type(self).__name__.lower()}({self.size}): the size must be at least 1"
            )


class _Causal(Bound):
    def upper(self, q: Array) -> Array:
        return q

    def reach(self) -> tuple[None, int]:
        return None, 0


class _Window(_Sized):
    def lower(self, q: Array) -> Array:
        return q - (self.size - 1)

    def reach(self) -> tuple[int, None]:
        return 1 - self.size, None


class _Sinks(_Sized):
    def upper(self, q: Array) -> Array:
        return jnp.full_like(q, self.size - 1)


class _Prefix(_Sized):
    def upper(self, q: Array) -> Array:
        return jnp.maximum(q, self.size - 1)


@dataclasses.dataclass(frozen=True)
class _Chunks(_Sized):
    nearest: int = 0  # chunks behind the query's own, both included
    farthest: int | None = 0

    def __post_init__(self):
        super().__post_init__()
        if self.nearest < 0 or not (self.farthest is None or self.nearest <= self.farthest):
            raise ValueError(
                f"chunks({self.size}, {self.nearest}, {self.farthest}): count back from 0, the "
                "nearer chunk first; None is all before"
            )

    def lower(self, q: Array) -> Array | None:
        return None if self.farthest is None else (q // self.size - self.farthest) * self.size

    def upper(self, q: Array) -> Array:
        return (q // self.size - self.nearest + 1) * self.size - 1

    def reach(self) -> tuple[int | None, int]:
        below = None if self.farthest is None else 1 - (self.farthest + 1) * self.size
        return below, 0 if self.nearest else self.size - 1


@dataclasses.dataclass(frozen=True)
class _Not(Bound):
    """The keys beyond a bound that has one side."""

    bound: Bound

    def lower(self, q: Array) -> Array | None:
        upper = self.bound.upper(q)
        return None if upper is None else upper + 1

    def upper(self, q: Array) -> Array | None:
        lower = self.bound.lower(q)
        return None if lower is None else lower - 1


@dataclasses.dataclass(frozen=True)
class Mask:
    """The intersection of bounds on key positions; `Mask()` shows all keys of the segment."""

    bounds: tuple[Bound, ...] = ()

    def __and__(self, other: "Mask") -> "Mask":
        return Mask((*self.bounds, *(b for b in other.bounds if b not in self.bounds)))

    def __invert__(self) -> "Mask":
        """The complement; only of a mask of one bound with one side, since others have holes.

        Raises:
            ValueError: if the complement is not an interval.
        """
        match self.bounds:
            case (_Not(bound),):
                return Mask((bound,))
            case (_Chunks(farthest=int()),):
                raise ValueError("~chunks(n) is not an interval: keys before and after are visible")
            case (bound,):
                return Mask((_Not(bound),))
        raise ValueError(
            f"~ takes a mask of one bound, this one has {len(self.bounds)}: "
            "write causal() & ~window(n), not ~(causal() & window(n))"
        )

    def interval(self, positions_BL: PerToken) -> tuple[PerToken, PerToken]:
        """First and last visible key position for each query position, int32 `[B, L]` each."""
        lower, upper = jnp.full_like(positions_BL, -FAR), jnp.full_like(positions_BL, FAR)
        for bound in self.bounds:
            low, high = bound.lower(positions_BL), bound.upper(positions_BL)
            lower = lower if low is None else jnp.maximum(lower, low)
            upper = upper if high is None else jnp.minimum(upper, high)
        return lower, upper

    def shows(self, q_pos: Array, k_pos: Array) -> Array:
        """Whether each key position is visible to each query position, broadcast to each other."""
        seen = jnp.ones((), bool)
        for bound in self.bounds:
            lower, upper = bound.lower(q_pos), bound.upper(q_pos)
            seen = seen if lower is None else seen & (lower <= k_pos)
            seen = seen if upper is None else seen & (k_pos <= upper)
        return seen

    def reach(self) -> tuple[int | None, int | None]:
        """Bounds on `k - q` that hold for every query and contain 0; `None` without a limit.

        Where positions grow by 1 or more from token to token they bound distances by index too.
        """
        reaches = [bound.reach() for bound in self.bounds]
        return (
            max((below for below, _ in reaches if below is not None), default=None),
            min((above for _, above in reaches if above is not None), default=None),
        )


def reaches(masks: tuple[Mask, ...]) -> tuple[int | None, int | None]:
    """The range of `k - q` outside which no mask shows a key, by index as `Mask.reach` says."""
    below, above = zip(*(mask.reach() for mask in masks), strict=True)
    return (None if None in below else min(below)), (None if None in above else max(above))


def causal() -> Mask:
    """Keys at or before the query."""
    return Mask((_Causal(),))


def window(size: int) -> Mask:
    """The last `size` positions up to the query (open above: combine with `causal()`)."""
    return Mask((_Window(size),))


def sinks(size: int) -> Mask:
    """The first `size` positions of the document (StreamingLLM, arXiv:2309.17453)."""
    return Mask((_Sinks(size),))


def prefix(size: int) -> Mask:
    """Causal, with the first `size` positions of the document visible to all (prefix LM)."""
    return Mask((_Prefix(size),))


def chunks(size: int, nearest: int = 0, farthest: int | None = 0) -> Mask:
    """Positions in chunks of `size` counted back from the query's own, which is chunk 0.

    `chunks(n)` is the chunked local attention of Llama 4, `chunks(n, 1, 1)` the chunk before it,
    `chunks(n, 2, None)` all earlier ones (dual chunk attention, arXiv:2402.17463).
    """
    return Mask((_Chunks(size, nearest, farthest),))


def visible(mask: Mask, q_context: Context, k_context: Context) -> Array:
    """The mask as a dense bool `[B, L, S]`: for the reference backend and for looking at."""
    shown = mask.shows(q_context.positions_BL[:, :, None], k_context.positions_BL[:, None, :])
    q_seg, k_seg = q_context.segments_BL[:, :, None], k_context.segments_BL[:, None, :]
    return shown & (q_seg == k_seg) & (k_seg > 0)
