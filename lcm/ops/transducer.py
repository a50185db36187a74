"""The RNN transducer's likelihood (Graves, 2012, arXiv:1211.3711): all alignments of two sequences.

A lattice has a node (t, u) for each of T input frames and each number 0 ... U of labels given so
far. At a node the model gives blank (label 0), which moves to the next frame, or the next label,
which stays; a path ends with the blank of the last frame. The likelihood is the sum over paths.

    alpha[t, u] = logaddexp(alpha[t-1, u] + blank[t-1, u], alpha[t, u-1] + emit[t, u-1])

A row of it is a prefix sum in log space, so that only frames are gone through one by one:

    alpha[t, :] = c + cumlogsumexp(alpha[t-1, :] + blank[t-1, :] - c)    c_u = sum_{v<u} emit[t, v]
"""

import jax
import jax.numpy as jnp

from lcm.types import Array

BLANK = 0
# Of what is impossible; -inf would make gradients nan.
NEVER = -1e30


def transducer_loss(
    logits_BTUV: Array, labels_BU: Array, frames_B: Array, labels_B: Array
) -> Array:
    """`-log P(labels | frames)` in nats of each row, float32 `[B]`.

    logits: `[B, T, U + 1, V]`, blank first, not normalised; labels 1 ... V - 1, padded with
        anything; frames_B (1 or more) and labels_B are how many of T and U a row has.

    Raises:
        ValueError: for shapes that do not go together.
    """
    blank_BTU, emit_BTU = lattice(logits_BTUV, labels_BU, labels_B)
    return -log_likelihood(blank_BTU, emit_BTU, frames_B, labels_B)


def lattice(logits_BTUV: Array, labels_BU: Array, labels_B: Array) -> tuple[Array, Array]:
    """Log-probabilities of blank and of the next label at each node, float32 `[B, T, U + 1]` both.

    The two of V that are read are gathered, so that no normalised copy of the logits is made.
    Beyond a row's labels there is no next one.
    """
    batch, frames, nodes, _ = logits_BTUV.shape
    if labels_BU.shape != (batch, nodes - 1) or not frames:
        raise ValueError(
            f"logits {logits_BTUV.shape} for labels {labels_BU.shape}: give [B, T, U + 1, V] with "
            "one frame or more, and [B, U]"
        )
    logits = logits_BTUV.astype(jnp.float32)
    log_z_BTU = jax.nn.logsumexp(logits, axis=-1)
    next_BU = jnp.pad(labels_BU, ((0, 0), (0, 1)))
    wanted = jnp.broadcast_to(next_BU[:, None, :, None], (batch, frames, nodes, 1))
    emit_BTU = jnp.take_along_axis(logits, wanted, axis=-1)[..., 0] - log_z_BTU
    left_BU = jnp.arange(nodes) < labels_B[:, None]
    return logits[..., BLANK] - log_z_BTU, jnp.where(left_BU[:, None], emit_BTU, NEVER)


def log_likelihood(blank_BTU: Array, emit_BTU: Array, frames_B: Array, labels_B: Array) -> Array:
    """`log P` of each row of lattices, from its last frame and label."""
    alpha_BTU = log_alphas(blank_BTU, emit_BTU)
    at = jnp.arange(len(frames_B)), frames_B - 1, labels_B
    return alpha_BTU[at] + blank_BTU[at]


def log_alphas(blank_BTU: Array, emit_BTU: Array) -> Array:
    """Log-probability of all ways from the beginning to each node, `[B, T, U + 1]`."""

    def frame(alpha_BU: Array, here: tuple[Array, Array]) -> tuple[Array, Array]:
        blank_BU, emit_BU = here
        alpha_BU = _along(alpha_BU + blank_BU, emit_BU)
        return alpha_BU, alpha_BU

    first_BU = _along(jnp.full_like(emit_BTU[:, 0], NEVER).at[:, 0].set(0.0), emit_BTU[:, 0])
    moves = blank_BTU[:, :-1].swapaxes(0, 1), emit_BTU[:, 1:].swapaxes(0, 1)
    _, rest_TBU = jax.lax.scan(frame, first_BU, moves)
    return jnp.concatenate([first_BU[:, None], rest_TBU.swapaxes(0, 1)], axis=1)


def log_betas(blank_BTU: Array, emit_BTU: Array, frames_B: Array, labels_B: Array) -> Array:
    """Log-probability of all ways from each node to the end of its row, `[B, T, U + 1]`.

    Nodes beyond the end have `NEVER` or less. For posteriors: the loss has its gradients from
    `log_alphas` alone.
    """
    _, frames, nodes = blank_BTU.shape
    end_BTU = (jnp.arange(frames)[:, None] == frames_B[:, None, None] - 1) & (
        jnp.arange(nodes) == labels_B[:, None, None]
    )

    def frame(beta_BU: Array, here: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        blank_BU, emit_BU, end_BU = here
        down_BU = jnp.where(end_BU, blank_BU, beta_BU + blank_BU)
        # The same prefix sum from the other end, where an edge enters the node that it leaves.
        edge_BU = jnp.pad(emit_BU[:, :-1], ((0, 0), (0, 1)))
        beta_BU = jnp.flip(_along(jnp.flip(down_BU, 1), jnp.flip(jnp.roll(edge_BU, 1, 1), 1)), 1)
        return beta_BU, beta_BU

    over = tuple(x.swapaxes(0, 1) for x in (blank_BTU, emit_BTU, end_BTU))
    none_BU = jnp.full_like(blank_BTU[:, 0], NEVER)
    _, beta_TBU = jax.lax.scan(frame, none_BU, over, reverse=True)
    return beta_TBU.swapaxes(0, 1)


def _along(enter_BU: Array, emit_BU: Array) -> Array:
    """All ways to each node of a frame, given those that enter it: `emit_u` leads from u to u + 1.

    Impossible edges are kept out of the prefix sums, where they would swallow what is added to
    them; nodes beyond one are reached from where they are entered alone.
    """
    there_BU = emit_BU > NEVER / 2

    def join(first: tuple[Array, Array, Array], second: tuple[Array, Array, Array]):
        (cost1, sum1, cut1), (cost2, sum2, cut2) = first, second
        # `sum` is relative to the end of the stretch: what the first has goes along the second.
        carried = jnp.where(cut2, NEVER, sum1 + cost2)
        return cost1 + cost2, jnp.logaddexp(carried, sum2), cut1 | cut2

    edge_BU = jnp.pad(jnp.where(there_BU, emit_BU, 0.0)[:, :-1], ((0, 0), (1, 0)))
    cut_BU = jnp.pad(~there_BU[:, :-1], ((0, 0), (1, 0)))
    _, sum_BU, _ = jax.lax.associative_scan(join, (edge_BU, enter_BU, cut_BU), axis=1)
    return sum_BU


def occupancy(blank_BTU: Array, emit_BTU: Array, frames_B: Array, labels_B: Array) -> Array:
    """The probability that an alignment passes each node, `[B, T, U + 1]`."""
    log_p_B = log_likelihood(blank_BTU, emit_BTU, frames_B, labels_B)
    beta_BTU = log_betas(blank_BTU, emit_BTU, frames_B, labels_B)
    return jnp.exp(log_alphas(blank_BTU, emit_BTU) + beta_BTU - log_p_B[:, None, None])
