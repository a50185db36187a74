"""A recurrence that reads a window alone, of a text in pieces: its state is what it has last read.

What tokens before the window have written is subtracted from the state (`lcm.nn.interventions`),
which takes them as they were. So a piece is read behind the tokens that it can still see, a token
that is generated, too: it costs as much as the window. In return the state is that of no mixer in
particular, and no error grows in it.
"""

import jax.numpy as jnp
from flax import nnx

from lcm.nn.recurrent import RecurrentState, empty, entered
from lcm.nn.spec import LayerSpec
from lcm.ops.recurrence.convolution import last, preceded, with_tail
from lcm.types import Array, Context, Hidden


def init_state(spec: LayerSpec, batch: int) -> RecurrentState:
    """The empty state: no inputs of the layer, which have, beside their channels, whether they are
    there and their pace."""
    return empty(batch, {}, (spec.width + 2,), kept(spec) + 1)


def kept(spec: LayerSpec) -> int:
    """Tokens that the next one needs: its window, and what a convolution or shift reads of those
    before it."""
    return spec.extension.window + max(spec.conv, 2) - 1


def mix(
    mixer: nnx.Module,
    spec: LayerSpec,
    u_BLD: Hidden,
    context: Context,
    state: RecurrentState,
    shared: dict,
) -> tuple[Hidden, RecurrentState]:
    """What a mixer whose `spec.extension` has a window makes of one piece, and the state behind it.

    Raises:
        ValueError: for a state that another layer has made.
    """
    before, reset_BL, there_BL = entered(state, init_state(spec, len(u_BLD)), context)
    (tail,) = before.tails
    pace_BL = jnp.ones(there_BL.shape) if context.pace_BL is None else context.pace_BL
    beside = jnp.stack([there_BL, pace_BL], -1)
    x = jnp.concatenate([u_BLD.astype(jnp.float32), beside], -1)
    x, document = with_tail(x, tail, reset_BL, there_BL)
    y, _ = mixer(
        x[..., :-2].astype(u_BLD.dtype),
        _context(context, tail[..., -2] > 0, state.segment_B, there_BL, x[..., -1]),
        None,
        shared,
    )
    after = RecurrentState({}, (last(x, document, tail.shape[1]),), before.segment_B)
    return y[:, tail.shape[1] :], after


def _context(
    context: Context, kept_BW: Array, segment_B: Array, there_BL: Array, pace: Array
) -> Context:
    """That of the tokens that are kept, which are of the segment of the state, and of those read.

    Recurrences ask for no position.
    """
    segments_BW = jnp.where(kept_BW, segment_B[:, None], 0)
    nowhere_BW = jnp.zeros_like(segments_BW)
    return Context(
        positions_BL=preceded(context.positions_BL, nowhere_BW, there_BL),
        segments_BL=preceded(context.segments_BL, segments_BW, there_BL),
        remaining_BL=preceded(context.remaining_BL, nowhere_BW - 1, there_BL),
        pace_BL=None if context.pace_BL is None else pace,
    )
