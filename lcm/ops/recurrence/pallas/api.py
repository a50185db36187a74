"""The recurrences on kernels: which of them there are, and arrays laid out as they take them."""

from collections.abc import Sequence
from types import ModuleType

import jax.numpy as jnp

from lcm.ops.recurrence.pallas import channels, erasing, matrices, plan, vectors
from lcm.ops.recurrence.pallas.matrix_kernels import Tile
from lcm.ops.recurrence.pallas.mesh import cut_of, over_mesh
from lcm.ops.recurrence.reference import by_head
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


def matrix_fits(shared: Sequence[Array], v: Array, log_decay: Array) -> bool:
    """Whether `matrix` is to be used: for a TPU, of heads that lie evenly in lanes, and more than
    one token."""
    _, length, heads, width = v.shape
    if not plan.here() or length == 1:
        return False
    groups, states = max(x.shape[2] for x in shared), shared[0].shape[3]
    if len(shared) > 2 or log_decay.ndim == 4:  # a and b are among them, or channels decay
        own = heads // cut_of(heads, *(x.shape[2] for x in shared if x.shape[2] > 1))
        return erasing.block(own, states, width) is not None
    # The only group is cut with its heads, of several each device has whole ones.
    each = heads // cut_of(heads) if groups == 1 else heads // groups
    return matrices.block(each, width, states) is not None


def matrix(
    shared: Sequence[Array], v: Array, heads: Sequence[Array], S0: Array, reset: Array
) -> tuple[Array, Array]:
    """Outputs `[B, L, H, P]` and the last state `[B, H, N, P]`.

    shared: q, k, and a, b if it erases, `[B, L, G, N]` each; heads: log-decays, and the rates of
    erasure, `[B, L, H]` each, or log-decays of channels alone, `[B, L, H, N]`; S0: `[B, H, N, P]`;
    reset: bool `[B, L]`.
    """
    # What there is one of all devices have.
    cut = [None if x.shape[2] == 1 else 2 for x in shared] + [2] * (1 + len(heads))
    run = _erasing if len(shared) > 2 else _decaying
    if heads[0].ndim == 4:
        run = _by_channel
    return over_mesh(run, (*cut, 1, None), (2, 1), *shared, v, *heads, S0, reset)


def _decaying(
    q: Array, k: Array, v: Array, log_decay: Array, S0: Array, reset: Array
) -> tuple[Array, Array]:
    batch, length, heads, width = v.shape
    groups, states = max(q.shape[2], k.shape[2]), q.shape[3]
    q, k = (by_head(x, groups, 2) for x in (q, k))
    tile = Tile(matrices.block(heads // groups, width, states), width, matrices.CHUNK)
    blocks, missing = heads // groups // tile.heads, -length % tile.chunk

    def by_group(x: Array) -> Array:
        """`[B, G, L, ...]`, padded to whole chunks by what leaves a state as it is."""
        x = x.reshape(batch, length, groups, -1).swapaxes(1, 2)
        return jnp.pad(x, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else x

    decay = by_group(log_decay.astype(jnp.float32)).swapaxes(2, 3)
    decay = decay.reshape(batch, groups, blocks, tile.heads, -1)
    state = S0.reshape(batch, groups, blocks, tile.heads, states, width)
    state = state.swapaxes(3, 4).reshape(*state.shape[:3], states, -1)
    given = matrices.Given(by_group(q), by_group(k), by_group(v), decay, state)
    y, last = matrices.run(tile, given, _documents(reset, tile.chunk))
    y = y[:, :, :length].swapaxes(1, 2).reshape(v.shape)
    last = last.reshape(*last.shape[:4], tile.heads, width).swapaxes(3, 4)
    return y, last.reshape(S0.shape)


def _erasing(
    q: Array,
    k: Array,
    a: Array,
    b: Array,
    v: Array,
    log_decay: Array,
    rate: Array,
    S0: Array,
    reset: Array,
) -> tuple[Array, Array]:
    tokens, of_heads = (q, k, a, b, v), (log_decay, rate)
    return _in_blocks(erasing, erasing.CHUNK, tokens, of_heads, v.shape, S0, reset)


def _by_channel(*given: Array) -> tuple[Array, Array]:
    """Of q, k, and a, b if it erases, v, log-decays, the state before, and resets."""
    *shared, v, log_decay, S0, reset = given
    chunk = channels.ERASING if len(shared) > 2 else channels.CHUNK
    tokens = log_decay.astype(jnp.float32), v, *shared
    return _in_blocks(channels, chunk, tokens, (), v.shape, S0, reset)


def _in_blocks(
    kernels: ModuleType,
    chunk: int,
    tokens: Sequence[Array],
    of_heads: Sequence[Array],
    shape: tuple[int, ...],
    S0: Array,
    reset: Array,
) -> tuple[Array, Array]:
    """Outputs of a shape `[B, L, H, P]` and the last state, of kernels for blocks of heads.

    kernels: `erasing` or `channels`, as whose `Given` the `[B, L, G, ...]` of tokens, in the order
    of its `Tokens`, and the `[B, L, H]` of heads are laid out.
    """
    batch, length, heads, width = shape
    most = erasing.block(heads, S0.shape[2], width)
    missing = -length % chunk
    tokens = kernels.Tokens(*(_in_lanes(x, most, heads, missing) for x in tokens))
    rows = (_padded(x.astype(jnp.float32), missing).swapaxes(1, 2) for x in of_heads)
    rows = (x.reshape(batch, -1, most, x.shape[-1]) for x in rows)
    given = kernels.Given(tokens, *rows, S0)
    tile = kernels.Tile(most, S0.shape[2], width, chunk)
    y, last = kernels.run(tile, given, _documents(reset, chunk))
    return y[:, :length].reshape(shape), last


def _in_lanes(x: Array, most: int, heads: int, missing: int) -> Array:
    """Heads of `[B, L, G, ...]` beside each other, all of them where a block of `most` would have
    parts of what they share; padded to whole chunks by what leaves a state as it is."""
    some = most * x.shape[2] // heads
    if some * heads != most * x.shape[2] or not erasing.in_lanes(some, x.shape[2], x.shape[3]):
        x = by_head(x, heads, 2)
    return _padded(x.reshape(*x.shape[:2], -1), missing)


def _documents(reset: Array, chunk: int) -> Array:
    """The number of a token's document in its chunk, float32 `[B, L]` of whole chunks."""
    reset = _padded(reset, -reset.shape[1] % chunk).reshape(len(reset), -1, chunk)
    return jnp.cumsum(reset, -1).astype(jnp.float32).reshape(len(reset), -1)


def _padded(x_BL: Array, missing: int) -> Array:
    """So many zeros behind the tokens of `[B, L, ...]`."""
    if not missing:
        return x_BL
    return jnp.pad(x_BL, [(0, 0), (0, missing)] + [(0, 0)] * (x_BL.ndim - 2))
