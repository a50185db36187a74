"""Where documents begin in rows that have padding."""

import jax
import jax.numpy as jnp

from lcm.types import Array, PerToken


def boundaries(segments_BL: PerToken, last_B: Array) -> tuple[Array, Array]:
    """Where a document begins, bool `[B, L]`, and the segment of the last token of each row.

    `last_B` is that before the first token, 0 if there is none. Padding (segment 0) begins nothing:
    what is on both sides of it is one document if the segment is.
    """
    there_BL = segments_BL > 0
    filled_BL = jnp.concatenate([last_B[:, None], segments_BL], 1)
    at_BL = jnp.where(filled_BL > 0, jnp.arange(filled_BL.shape[1]), 0)
    filled_BL = jnp.take_along_axis(filled_BL, jax.lax.cummax(at_BL, 1), 1)
    return there_BL & (segments_BL != filled_BL[:, :-1]), filled_BL[:, -1]
