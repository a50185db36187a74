"""The recurrences on kernels: which of them there are, and arrays laid out as they take them."""

import jax.numpy as jnp

from lcm.ops.recurrence.pallas import matrices, plan, vectors
from lcm.ops.recurrence.pallas.matrix_kernels import Tile
from lcm.ops.recurrence.pallas.mesh import cut_of, over_mesh
from lcm.types import Array


def diagonal_fits(a: Array, b: Array) -> bool:
    """Whether `diagonal` is to be used: for a TPU, of real numbers and more than one token."""
    real = not (jnp.iscomplexobj(a) or jnp.iscomplexobj(b))
    return plan.here() and real and b.shape[1] > 1 and b.size > 0


def diagonal(a: Array, b: Array, h0: Array) -> Array:
    """All states of `h_t = a_t h_{t-1} + b_t`, float32 `[B, L, ...]`; rows and channels of each
    device under a mesh."""

    def run(a: Array, b: Array, h0: Array) -> Array:
        batch, length, *axes = b.shape
        # The largest axis is that of lanes, where XLA has it too: of 5120 x 16 numbers that saves
        # two fifths of the time beside the kernels.
        last = axes.index(max(axes)) - len(axes) if axes else -1
        a, b, h0 = (jnp.moveaxis(x, last, -1) for x in (a, b, h0))
        flat = batch, length, -1
        h = vectors.states(a.reshape(flat), b.reshape(flat), h0.reshape(batch, -1))
        return jnp.moveaxis(h.reshape(b.shape), -1, last)

    channels = 2 if b.ndim > 2 else None
    return over_mesh(run, (channels, channels, channels and 1), channels, a, b, h0)


def matrix_fits(q: Array, v: Array, log_decay: Array, erase: object) -> bool:
    """Whether `matrix` is to be used: for a TPU, of one decay a head, without erasure, of heads
    that lie evenly in lanes, and more than one token."""
    (_, length, heads, width), (groups, states) = v.shape, q.shape[2:]
    if not plan.here() or length == 1 or log_decay.ndim != 3 or erase:
        return False
    # The only group is cut with its heads, of several each device has whole ones.
    each = heads // cut_of(heads) if groups == 1 else heads // groups
    return matrices.block(each, width, states) is not None


def matrix(
    q: Array, k: Array, v: Array, log_decay: Array, S0: Array, reset: Array
) -> tuple[Array, Array]:
    """Outputs `[B, L, H, P]` and the last state `[B, H, N, P]` of one decay a head.

    q, k: `[B, L, G, N]`; log_decay: `[B, L, H]`; S0: `[B, H, N, P]`; reset: bool `[B, L]`.
    """
    whole = q.shape[2] == 1  # then all devices have the only group
    of_group = None if whole else 2
    cut = of_group, of_group, 2, 2, 1, None
    return over_mesh(_matrix, cut, (2, 1), q, k, v, log_decay, S0, reset)


def _matrix(
    q: Array, k: Array, v: Array, log_decay: Array, S0: Array, reset: Array
) -> tuple[Array, Array]:
    batch, length, heads, width = v.shape
    groups, states = q.shape[2:]
    tile = Tile(matrices.block(heads // groups, width, states), width, matrices.CHUNK)
    blocks, missing = heads // groups // tile.heads, -length % tile.chunk

    def by_group(x: Array) -> Array:
        """`[B, G, L, ...]`, padded to whole chunks by what leaves a state as it is."""
        x = x.reshape(batch, length, groups, -1).swapaxes(1, 2)
        return jnp.pad(x, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else x

    decay = by_group(log_decay.astype(jnp.float32)).swapaxes(2, 3)
    decay = decay.reshape(batch, groups, blocks, tile.heads, -1)
    reset = jnp.pad(reset, [(0, 0), (0, missing)]).reshape(batch, -1, tile.chunk)
    document = jnp.cumsum(reset, -1).astype(jnp.float32).reshape(batch, -1)
    state = S0.reshape(batch, groups, blocks, tile.heads, states, width)
    state = state.swapaxes(3, 4).reshape(*state.shape[:3], states, -1)
    given = matrices.Given(by_group(q), by_group(k), by_group(v), decay, state)
    y, last = matrices.run(tile, given, document)
    y = y[:, :, :length].swapaxes(1, 2).reshape(v.shape)
    last = last.reshape(*last.shape[:4], tile.heads, width).swapaxes(3, 4)
    return y, last.reshape(S0.shape)
