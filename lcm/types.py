"""Dimension legend, named array types, and the two records that travel through the package.

Legend, used as a suffix of array names (`x_BLD`):
B batch, L query length, S key length, D model width, H query heads, G key/value heads, K head size,
F hidden width of the MLP, V vocabulary, N state, P state channels, or values of a head where their
size is one of their own, C chunk.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

Array = jax.Array | np.ndarray
Hidden = Float[Array, "B L D"]
Queries = Float[Array, "B L H K"]
Keys = Float[Array, "B S G K"]
Values = Float[Array, "B S G P"]
Attended = Float[Array, "B L H P"]
Tokens = Int[Array, "B L"]
PerToken = Int[Array, "B L"]
Logits = Float[Array, "B L V"]


class Context(NamedTuple):
    """Where each token stands, int32 `[B, L]` each.

    positions: position of the token within its document (or piece of one), from 0.
    segments: the document a token of a packed row belongs to, from 1; 0 is padding.
    remaining: content tokens still to come after this one; -1 where length is not controlled.
    pace: float32, how far the clock of a recurrence goes at each token, as a multiple of its own
        step (`lcm.nn.intervals`); None where each goes one step.
    interval: float32, the time since the token before, for an encoding that embeds it
        (`lcm.positions.Intervals`); None where tokens have no times.
    """

    positions_BL: Array
    segments_BL: Array
    remaining_BL: Array
    pace_BL: Array | None = None
    interval_BL: Array | None = None


class Batch(NamedTuple):
    """Tokens, the next token at each place, where they stand, and what each counts in the loss.

    loss_weight is float32 `[B, L]`: 0 at padding and wherever the target must not be learned.
    """

    tokens_BL: Array
    targets_BL: Array
    context: Context
    loss_weight_BL: Array
