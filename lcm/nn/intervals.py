"""Times that are not regular: what a layer is told of them, and how its own clock follows.

Where events come at times, the interval tau_j = t_j - t_{j-1} before each says how far the state of
a recurrence is to move (IC-Mamba, arXiv:2502.04655). Its code does not hold this transition; what
is here is the exact discretisation of the same system over the interval.

Times reach a mixer as `Context.pace_BL`, an optional array beside positions: a model of any depth
hands it on as it is, and what has no clock does not look. They may reach its input too, as
`Context.interval_BL`, which `lcm.positions.Intervals` embeds.
"""

import jax.numpy as jnp
import numpy as np

from lcm.ops.recurrence import boundaries
from lcm.types import Array, PerToken


def intervals(times_BL: Array, segments_BL: PerToken) -> Array:
    """`tau_j = t_j - t_{j-1}` of each token, float32; 0 where a document begins, and at padding.

    Differences are taken before they are rounded to float32, so give times that the dtype holds:
    seconds since 1970 want float64 or integers, of numpy.

    Raises:
        ValueError: for times that go back within a document, where they can be seen.
    """
    lib = np if isinstance(times_BL, np.ndarray) and isinstance(segments_BL, np.ndarray) else jnp
    gap_BL = lib.diff(times_BL, axis=1, prepend=times_BL[:, :1])
    before_BL = lib.concatenate([segments_BL[:, :1] * 0, segments_BL[:, :-1]], axis=1)
    tau_BL = lib.where((segments_BL > 0) & (segments_BL == before_BL), gap_BL, 0)
    if lib is np and (tau_BL < 0).any():
        row, at = np.argwhere(tau_BL < 0)[0]
        raise ValueError(
            f"time {times_BL[row, at]} of row {row} follows {times_BL[row, at - 1]}: sort the "
            "events of a document by time"
        )
    return tau_BL.astype(lib.float32)


def pace(tau_BL: Array, segments_BL: PerToken, reference: float, least: float = 0.0) -> Array:
    """`Context.pace_BL` for `Delta_j = softplus(...) tau_j / reference`, float32 `[B, L]`.

    The first token of a document has pace 1: nothing is before it, and at 0 it would not be
    written. `least` is what events at one time have; at 0 the state is told of the first alone, as
    an input held for no time adds nothing.

    Raises:
        ValueError: for a reference that is not more than 0, or `least` below 0, or other shapes.
    """
    if tau_BL.shape != segments_BL.shape:
        raise ValueError(f"intervals {tau_BL.shape} of segments {segments_BL.shape}: give [B, L]")
    if not reference > 0 or not least >= 0:
        raise ValueError(
            f"reference {reference}, least {least}: give a typical interval, more than 0, and "
            "least 0 or more"
        )
    begins_BL, _ = boundaries(segments_BL, jnp.zeros(len(segments_BL), jnp.int32))
    return jnp.where(begins_BL, 1.0, jnp.maximum(tau_BL / reference, least)).astype(jnp.float32)
