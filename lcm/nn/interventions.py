"""What is done to a recurrence from outside its layer, so that it reads longer than it has learned.

A mixer gives its operator log-decays l, which it forgets by, and what it writes w. `Extension` says
what becomes of the two before they get there, the same for every mixer:

    step      l, w -> s l, s w          the clock slowed, as positions are interpolated; `exact` has
                                        w (1 - e^(s l)) / (1 - e^l), with which n steps of 1 / n
                                        are one step
    spectrum  |A| -> |A|^s              rates of layers that have some (Mamba Modulation, 2025,
                                        arXiv:2509.19633)
    retain    e^l -> c e^l              forget more, and remember less (Chen et al., 2024,
    insert    w -> c w                  arXiv:2410.07145v1, section 4.1)
    window    the last r tokens alone   S_t - (prod of e^l over r tokens) S_(t-r), section 4.3; of
                                        a text in pieces by `lcm.nn.recent`

Of the delta rule w is what it erases, too. A pace (`Context.pace_BL`) scales both as well, 0 being
a token that is not there. Norms are held in bounds by `lcm.models.initial.normalised`, tokens left
out by `lcm.models.decimation`, clocks of some heads alone slowed by `lcm.models.distance`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.nn.literal import settings
from lcm.ops.recurrence import op_diag, op_matrix
from lcm.ops.recurrence.reference import Erase, by_head
from lcm.types import Array, Context

LEAST = 1e-30  # of decays whose logarithm is taken


@dataclasses.dataclass(frozen=True)
class Extension:
    """Factors and powers of 1 and a window of 0 change nothing, bit for bit."""

    step: float = 1.0
    exact: bool = False
    spectrum: float = 1.0
    retain: float = 1.0
    insert: float = 1.0
    window: int = 0

    @property
    def scales(self) -> bool:
        """Whether log-decays or writes are multiplied."""
        return (self.step, self.retain, self.insert) != (1, 1, 1)

    def cuts(self, length: int) -> bool:
        """Whether the window leaves out any of so many tokens."""
        return 0 < self.window < length

    @property
    def alone(self) -> "Extension":
        """The window, without what has been done before."""
        return Extension(window=self.window)


ALL = frozenset(field.name for field in dataclasses.fields(Extension))
LINEAR = ALL - {"spectrum"}  # of a state that is linear in what is written
_LIMITS = {
    "step": (1e-6, 1e6),
    "spectrum": (0.01, 100.0),
    "retain": (1e-6, 1.0),
    "insert": (0.0, 1e6),
    "window": (0, 1 << 30),
}


def parsed(where: str, text: str, mixer: str, has: frozenset[str]) -> Extension:
    """The extension of `NAME=VALUE,...`, such as `step=0.5,exact=True`, for a mixer that has some.

    Raises:
        ConfigError: for a name that there is not or that the mixer has no place for, or a value
            that cannot be.
    """
    where, defaults = f"{where}.extension", dataclasses.asdict(Extension())
    values = settings(where, text, defaults, "an extension")
    for name, value in values.items():
        if name not in has:
            rest = ", ".join(sorted(has)) or "no extension"
            raise ConfigError(
                f"{where}={text!r}: {name} cannot be done to {mixer}, which has {rest}"
            )
        low, high = _LIMITS.get(name, (0, 1))
        if not low <= value <= high:
            raise ConfigError(f"{where}={text!r}: {name}={value} must lie from {low:g} to {high:g}")
    return Extension(**values)


def rate(own: Extension, A_log: Array) -> Array:
    """`|A|` of a logarithm, or a power of it."""
    return jnp.exp(A_log if own.spectrum == 1 else own.spectrum * A_log)


def scaled(own: Extension, log_decay: Array, context: Context) -> tuple[Array, Array | float]:
    """Log-decays `[B, L, ...]`, and by what all that is written is to be multiplied: a number, or
    an array that broadcasts with them. Padding keeps its decay of 1."""
    gain: Array | float = own.insert
    if own.step != 1:
        gain *= _share(log_decay, own.step) if own.exact else own.step
        log_decay = own.step * log_decay
    if own.retain != 1:
        there = _over(context.segments_BL > 0, log_decay)
        log_decay = log_decay + there * jnp.log(own.retain)
    if context.pace_BL is not None:
        pace = _over(context.pace_BL, log_decay)
        log_decay, gain = pace * log_decay, pace * gain
    return log_decay, gain


def gate(own: Extension, token: Context, log_decay_BC: Array) -> tuple[Array, Array | float]:
    """`scaled` of one token of each row, whose context is `[B, 1]`: for gates that see a state."""
    log_decay, gain = scaled(own, log_decay_BC[:, None], token)
    return log_decay[:, 0], gain if jnp.ndim(gain) == 0 else gain[:, 0]


def by_token(context: Context) -> Context:
    """`[L, B, 1]`, for a scan over tokens."""
    return jax.tree.map(lambda x_BL: x_BL.swapaxes(0, 1)[..., None], context)


def matrix(
    own: Extension,
    context: Context,
    q_BLGN: Array,
    k_BLGN: Array,
    v_BLHP: Array,
    log_decay: Array,
    erase: Erase | None,
    S0_BHNP: Array,
    reset_BL: Array,
    chunk: int,
    operator: Callable[..., tuple[Array, Array]] = op_matrix,
) -> tuple[Array, Array]:
    """`op_matrix`, or another with its arguments, of what an extension makes of them."""
    if own.scales or context.pace_BL is not None:
        log_decay, gain = scaled(own, log_decay, context)
        k_BLGN, v_BLHP = _written(k_BLGN, v_BLHP, gain)
        if erase is not None:
            erase = _erased(erase, gain)
    run = lambda k, v, S0: operator(  # noqa: E731
        q_BLGN, k, v, log_decay, erase, S0, reset_BL, chunk=chunk
    )
    if not own.cuts(q_BLGN.shape[1]):
        return run(k_BLGN, v_BLHP, S0_BHNP)
    faded = jnp.exp(summed(log_decay.astype(jnp.float32), own.window))
    there_BL = same_document(reset_BL, own.window)
    # What is left of a token after r more; two sums that are close, so both are float32.
    old = (delayed(x.astype(jnp.float32), own.window) for x in (k_BLGN, v_BLHP))
    k, v = _written(*old, faded)
    y, S = run(k_BLGN, v_BLHP.astype(jnp.float32), S0_BHNP)
    old_y, old_S = run(k, v * _over(there_BL, v), jnp.zeros_like(S0_BHNP))
    return (y - old_y).astype(v_BLHP.dtype), S - old_S


def diagonal(
    own: Extension,
    context: Context,
    a: Array,
    b: Array,
    h0: Array,
    reset_BL: Array,
    chunk: int,
) -> tuple[Array, Array]:
    """`op_diag` of what an extension makes of its arguments."""
    if own.scales or context.pace_BL is not None:
        log_a, gain = scaled(own, _log(a), context)
        a, b = jnp.exp(log_a), gain * b
    if own.cuts(a.shape[1]):
        there = _over(same_document(reset_BL, own.window), b)
        old = jnp.exp(summed(_log(a), own.window)) * delayed(b, own.window)
        b = b - there * old
    return op_diag(a, b, h0, reset_BL, chunk=chunk)


def delayed(x_BL: Array, by: int, fill: float = 0) -> Array:
    """`[B, L, ...]` with each token at the place `by` after its own."""
    widths = [(0, 0), (by, 0), *[(0, 0)] * (x_BL.ndim - 2)]
    return jnp.pad(x_BL, widths, constant_values=fill)[:, : x_BL.shape[1]]


def summed(x_BL: Array, window: int) -> Array:
    """Sums of the last `window` tokens: no large ones that cancel."""
    return over_window(jnp.add, x_BL, window, 0.0)


def over_window(join: Callable[[Any, Any], Any], tokens: Any, window: int, nothing: Any) -> Any:
    """What `join(older, newer)`, which is associative, makes of the last `window` tokens.

    By doubling: of 2 n tokens from those of n tokens and of the n before them.

    tokens: a tree of arrays `[B, L, ...]`.
    nothing: of the same structure, numbers that stand before the first token.
    """

    def before(x: Any, by: int) -> Any:
        return jax.tree.map(lambda leaf, fill: delayed(leaf, by, fill), x, nothing)

    total, done = None, 0
    span, size = tokens, 1
    while size <= window:
        if window & size:
            total = span if total is None else join(before(span, done), total)
            done += size
        span, size = join(before(span, size), span), 2 * size
    return total


def same_document(reset_BL: Array, by: int) -> Array:
    """Whether the token `by` before is there, in the same document."""
    document_BL = jnp.cumsum(reset_BL, 1)
    return document_BL == delayed(document_BL, by, fill=-1)


def _written(k: Array, v: Array, gain: Array | float) -> tuple[Array, Array]:
    """Keys and values of which one is multiplied: values by head, keys by channel."""
    if jnp.ndim(gain) == 4:
        return by_head(k, v.shape[2], 2) * gain, v
    return k, (v * (gain if jnp.ndim(gain) == 0 else gain[..., None])).astype(v.dtype)


def _erased(erase: Erase, gain: Array | float) -> Erase:
    """The same with a gain, which is of heads where the rate of `erase` is."""
    *sides, last = erase
    return *sides, (gain if len(erase) > 2 else _by_channel(gain)) * last


def _by_channel(gain: Array | float) -> Array | float:
    return gain[..., None] if jnp.ndim(gain) == 3 else gain


def _share(log_decay: Array, step: float) -> Array:
    """`(1 - e^(s l)) / (1 - e^l)`, s where l is 0."""
    still = log_decay == 0
    safe = jnp.where(still, -1, log_decay)
    return jnp.where(still, step, jnp.expm1(step * safe) / jnp.expm1(safe))


def _log(a: Array) -> Array:
    return jnp.log(a if jnp.iscomplexobj(a) else jnp.maximum(a, LEAST))


def _over(x_BL: Array, like: Array) -> Array:
    """What tokens have, with axes for what is `[B, L, ...]`."""
    return x_BL.reshape(*x_BL.shape, *[1] * (like.ndim - 2))
