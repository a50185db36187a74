"""Times that are not regular: what a layer is told of them, and how its own clock follows.

Where events come at times, the interval tau_j = t_j - t_{j-1} before each says how far the state of
a recurrence is to move (IC-Mamba, arXiv:2502.04655). Its code does not hold this transition; what
is here is the exact discretisation of the same system over the interval, and the embedding beside.

Times reach a mixer as `Context.pace_BL`, an optional array beside positions: a model of any depth
hands it on as it is, and what has no clock does not look.
"""

import jax.numpy as jnp
import numpy as np

from lcm.ops.recurrence import boundaries
from lcm.types import Array, PerToken

# Angular speeds of log(1 + tau): from a turn over all intervals up to a day in seconds and more
# (log(1 + 86400) is 11.4), to one within a few percent of a time.
SLOWEST, FASTEST = 0.5, 128.0


def interval_embedding(
    tau_BL: Array, width: int, *, slowest: float = SLOWEST, fastest: float = FASTEST
) -> Array:
    """`[sin, cos](omega_m log(1 + tau))`, float32 `[B, L, width]`; M speeds, log-spaced.

    To be added to the embeddings of events.

    Raises:
        ValueError: for an odd width, or speeds that are no range above 0.
    """
    if width < 2 or width % 2:
        raise ValueError(f"width {width} has no sines and cosines in pairs: give an even one")
    if not 0 < slowest <= fastest:
        raise ValueError(f"speeds {slowest} to {fastest} are no range above 0: give slowest first")
    omega_M = np.geomspace(slowest, fastest, width // 2, dtype=np.float32)
    angle_BLM = jnp.log1p(tau_BL.astype(jnp.float32))[..., None] * omega_M
    return jnp.concatenate([jnp.sin(angle_BLM), jnp.cos(angle_BLM)], axis=-1)


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
        ValueError: for a reference that is not more than 0, or `least` below 0.
    """
    if not reference > 0 or not least >= 0:
        raise ValueError(
            f"reference {reference}, least {least}: give a typical interval, more than 0, and "
            "least 0 or more"
        )
    begins_BL, _ = boundaries(segments_BL, jnp.zeros(len(segments_BL), jnp.int32))
    return jnp.where(begins_BL, 1.0, jnp.maximum(tau_BL / reference, least)).astype(jnp.float32)
