"""`attend` and `attend_partial`: check arguments, fill in the default context, call a backend."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from lcm.ops.attention import blockwise, mapped, pallas, reference, sharded, softplus, spread
from lcm.ops.attention.normaliser import SOFTMAX, Normaliser, Softplus
from lcm.ops.attention.part import Part, Partial, merge
from lcm.ops.attention.spread import Spread
from lcm.ops.platform import platform
from lcm.types import Attended, Context, Queries, Values


class Backend(NamedTuple):
    """An implementation of attention and the platforms that can run it.

    attend: `(parts, v_BSGK, q_context, k_context, scale) -> Partial`.
    softplus: `(parts, v_BSGK, q_context, k_context, power) -> out_BLHK`, if there is one.
    local: `attend` of one device, where it is another function.
    known: `local` where the result over all keys is known, for the gradient by some of them.
    """

    attend: Callable[..., Partial]
    platforms: tuple[str, ...]
    softplus: Callable[..., Queries] | None = None
    local: Callable[..., Partial] | None = None
    known: Callable[..., Partial] | None = None


EVERYWHERE = ("cpu", "gpu", "tpu")
BACKENDS = {
    "reference": Backend(reference.attend, EVERYWHERE, softplus.dense),
    "blockwise": Backend(mapped.attend, EVERYWHERE, softplus.blockwise, known=blockwise.attend),
    "pallas": Backend(
        sharded.over_mesh(pallas.attend), ("tpu",), local=pallas.attend, known=pallas.attend
    ),
}

# Queries below which a dense matrix of scores is no larger than the keys: decoding.
FEW = 16


def attend(
    parts: Sequence[Part],
    v_BSGK: Values,
    q_context: Context | None = None,
    k_context: Context | None = None,
    *,
    scale: float | None = None,
    normaliser: Normaliser = SOFTMAX,
    backend: str = "auto",
    over: Spread = Spread(),  # noqa: B008, frozen
) -> Attended:
    """Attention over values that parts share, by one softmax over the union of their scores.

    A key that two parts show to a query counts twice, as in a concatenation of the parts along the
    key axis. Where one context serves queries and keys, or none is given for sequences of one
    length, positions must increase from token to token within a segment, as in packed rows:
    backends then skip by index what the masks hide.

    Args:
        parts: each with its own queries `[B, L, H, K]`, keys `[B, S, G, K]`, mask, score
            modification and block map.
        v_BSGK: values, shared by the parts; their size may be one of their own, P.
        q_context: where the queries stand; by default the last L of S places of one document.
        k_context: where the keys stand; by default 0 to S - 1 of one document.
        scale: factor on the scores before `score_mod`; 1/sqrt(K) by default.
        normaliser: how scores become weights: `Softmax()`, `SoftmaxSink(sink_H)` or `Softplus()`.
        backend: one of `BACKENDS`, or "auto".
        over: how it goes over the mesh axis `context`, and in which order tokens lie on it.

    Returns:
        `[B, L, H, P]` in the dtype of the values; zero where a query sees no key. Sums are float32.

    Raises:
        ValueError: if shapes do not fit, or the backend is unknown or not for this platform.
    """
    if not isinstance(normaliser, Softplus):
        return attend_partial(
            parts,
            v_BSGK,
            q_context,
            k_context,
            scale=scale,
            normaliser=normaliser,
            backend=backend,
            over=over,
        ).out_BLHK
    if scale is not None:
        raise ValueError(
            f"scale {scale} does nothing to Softplus, which sets its own: leave it out"
        )
    parts, q_context, k_context = _arguments(parts, v_BSGK, q_context, k_context)
    k_context = _as_ordered(over, parts, k_context)
    run = _backend(backend, parts, "softplus")
    return run(parts, v_BSGK, q_context, k_context, normaliser.power)


def attend_partial(
    parts: Sequence[Part],
    v_BSGK: Values,
    q_context: Context | None = None,
    k_context: Context | None = None,
    *,
    scale: float | None = None,
    normaliser: Normaliser = SOFTMAX,
    backend: str = "auto",
    over: Spread = Spread(),  # noqa: B008, frozen
) -> Partial:
    """`attend` over some of the keys, with what `merge` needs to join it with others."""
    if isinstance(normaliser, Softplus):
        raise ValueError(
            "attention by Softplus has no partials: a row's weights need its sum over the keys of "
            "all parts before their powers; give all parts to one call of attend"
        )
    if not isinstance(normaliser, Normaliser):
        raise ValueError(
            f"normaliser {normaliser!r} is unknown: use Softmax(), "
            "SoftmaxSink(sink_H) or Softplus(power)"
        )
    parts, q_context, k_context = _arguments(parts, v_BSGK, q_context, k_context)
    scale = parts[0].q_BLHK.shape[-1] ** -0.5 if scale is None else scale
    run = _backend(backend, parts, "attend")
    if q_context is k_context and spread.applies(parts, v_BSGK.shape[1]):
        chosen = next(each for each in BACKENDS.values() if each.attend is run)
        local = chosen.local or chosen.attend
        partial = spread.attend(local, chosen.known, over, parts, v_BSGK, q_context, scale)
    else:
        k_context = _as_ordered(over, parts, k_context)
        partial = run(parts, v_BSGK, q_context, k_context, scale)
    return partial if normaliser == SOFTMAX else merge(partial, normaliser.partial(partial))


def _arguments(
    parts: Sequence[Part], v_BSGK: Values, q_context: Context | None, k_context: Context | None
) -> tuple[tuple[Part, ...], Context, Context]:
    """Parts and contexts that fit each other, the default contexts filled in."""
    parts = tuple(parts)
    _check(parts, v_BSGK)
    batch, length = parts[0].q_BLHK.shape[:2]
    slots = v_BSGK.shape[1]
    k_context = _one_document(batch, 0, slots) if k_context is None else k_context
    if q_context is None:
        whole = length == slots
        q_context = k_context if whole else _one_document(batch, slots - length, slots)
    _check_context("q_context", q_context, (batch, length))
    _check_context("k_context", k_context, (batch, slots))
    return tuple(_with_clean_blocks(part) for part in parts), q_context, k_context


def _as_ordered(over: Spread, parts: tuple[Part, ...], k_context: Context) -> Context:
    """The context of keys, as another one than that of queries if indices say nothing of order."""
    if not over.shuffled:
        return k_context
    if any(part.blocks is not None for part in parts):
        raise ValueError(
            f"block maps count tokens in the order of the text, which mesh.order={over.order!r} "
            "changes: set mesh.order=plain"
        )
    return Context(*k_context)


def _with_clean_blocks(part: Part) -> Part:
    if part.blocks is None:
        return part
    slots = part.k_BSGK.shape[1]
    part.blocks.check(part.q_BLHK.shape[1], slots, part.q_BLHK.shape[2])
    return dataclasses.replace(part, blocks=part.blocks.clean(slots))


def _backend(name: str, parts: tuple[Part, ...], task: str) -> Callable:
    """The backend's function for a task, if this platform can run it."""
    if name == "auto":
        name = _fastest(parts, task)
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"attention backend {name!r} is unknown: use one of {known}")
    backend, here = BACKENDS[name], platform()
    if here not in backend.platforms:
        raise ValueError(
            f"attention backend {name!r} runs on {', '.join(backend.platforms)}, not on "
            f"{here!r}: use 'blockwise', or compile under jax.set_mesh(...) of another platform"
        )
    run = getattr(backend, task)
    if run is None:
        raise ValueError(f"attention backend {name!r} does not compute {task}: use 'blockwise'")
    return run


def _fastest(parts: tuple[Part, ...], task: str) -> str:
    if parts[0].q_BLHK.shape[1] < FEW:
        return "reference"
    kernels = task == "attend" and pallas.fits(parts)
    return "pallas" if platform() == "tpu" and kernels else "blockwise"


def _one_document(batch: int, start: int, stop: int) -> Context:
    positions = jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (batch, stop - start))
    return Context(positions, jnp.ones_like(positions), jnp.full_like(positions, -1))


def _check(parts: tuple[Part, ...], v_BSGK: Values) -> None:
    if not parts:
        raise ValueError("attend needs at least one part")
    for part in parts:
        q, k, v = part.q_BLHK.shape, part.k_BSGK.shape, v_BSGK.shape
        if len(q) != 4 or len(k) != 4 or len(v) != 4:
            raise ValueError(f"queries {q}, keys {k}, values {v}: each needs 4 axes [B, L, H, K]")
        if q != parts[0].q_BLHK.shape:
            raise ValueError(f"parts differ in queries: {parts[0].q_BLHK.shape} and {q}")
        if q[0] != k[0] or q[3] != k[3] or k[:3] != v[:3]:
            raise ValueError(
                f"queries {q}, keys {k} and values {v} do not fit: queries and keys share batch "
                "and head size, keys and values share batch, length and heads"
            )
        if q[2] % k[2]:
            raise ValueError(
                f"{q[2]} query heads cannot share {k[2]} key heads: take a divisor of {q[2]}"
            )


def _check_context(name: str, context: Context, shape: tuple[int, int]) -> None:
    if context.positions_BL.shape != shape or context.segments_BL.shape != shape:
        raise ValueError(
            f"{name} has positions {context.positions_BL.shape} and segments "
            f"{context.segments_BL.shape}, the arrays have {shape}"
        )
