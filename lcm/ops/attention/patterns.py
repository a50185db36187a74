"""Sparse patterns as block maps: BigBird's fixed one, and vertical-slash from the scores."""

import jax
import jax.numpy as jnp
import numpy as np

from lcm.ops.attention.blocks import BlockMap
from lcm.types import Array, Keys, Queries


def bigbird(
    length: int,
    size: int = 64,
    *,
    window: int = 3,
    globals_: tuple[int, ...] = (0, -1),
    random: int = 3,
    within: int | None = None,
    heads: int = 1,
    seed: int = 0,
) -> BlockMap:
    """Window, global and random blocks (BigBird, Zaheer et al., arXiv:2007.14062).

    Every row of blocks sees `window` blocks around itself, the global blocks and `random` others,
    drawn once, without replacement, for each head; global rows see everything and are the map's
    `full` rows. As in the paper's code the second row does not draw the last block but one, nor
    that row the second block.

    Args:
        length: tokens; the pattern has length / size blocks, rounded up.
        size: tokens of a block.
        window: blocks around the row's own, an odd number.
        globals_: global blocks, from the end where negative.
        random: blocks drawn for each row, fewer where fewer are left.
        within: blocks from the start that are drawn from; all by default. The released code draws
            from the first 1024 tokens at the lengths of its plan.
        heads: 1 for one pattern for all heads.
        seed: of the draws.
    """
    blocks = -(-length // size)
    if window % 2 == 0:
        raise ValueError(f"window {window}: choose an odd number of blocks")
    full = sorted({g % blocks for g in globals_})
    generator = np.random.default_rng(seed)
    indices = np.full((heads, blocks, window + len(full) + random), -1, np.int32)
    for row in range(blocks):
        near = range(max(row - window // 2, 0), min(row + window // 2 + 1, blocks))
        seen = sorted({*near, *full})
        indices[:, row, : len(seen)] = seen
        opposite = {1: blocks - 2, blocks - 2: 1}.get(row)
        taken = {*seen} if opposite is None else {*seen, opposite}
        for head in range(heads):
            drawn = _draw(generator, min(within or blocks, blocks), sorted(taken), random)
            indices[head, row, len(seen) : len(seen) + len(drawn)] = drawn
    return BlockMap(size, indices, tuple(full))


def _draw(generator: np.random.Generator, count: int, taken: list[int], wanted: int) -> np.ndarray:
    """Up to `wanted` of 0 .. count - 1 without those taken, which are in order."""
    taken = [t for t in taken if t < count]
    left = count - len(taken)
    drawn = generator.choice(left, min(wanted, left), replace=False, shuffle=False)
    for t in taken:
        drawn = drawn + (drawn >= t)
    return drawn


def vertical_slash(
    q_BLHK: Queries,
    k_BSGK: Keys,
    *,
    size: int = 64,
    vertical: int = 16,
    slash: int = 16,
    last: int = 64,
    scale: float | None = None,
) -> BlockMap:
    """The columns and diagonals of blocks that the last queries attend to most.

    MInference 1.0 (arXiv:2407.02490), at the grain of blocks: causal attention of the `last`
    queries is summed by column and by diagonal, over the batch too; each head keeps its `vertical`
    best columns and `slash` best diagonals of blocks, the first column and the two nearest
    diagonals always. A diagonal of tokens counts for the two diagonals of blocks that it crosses,
    by the share it has in each. Meant for causal masks; no gradient passes.

    Raises:
        ValueError: if there are not as many queries as keys.
    """
    _, length, heads, width = q_BLHK.shape
    if k_BSGK.shape[1] != length:
        raise ValueError(
            f"vertical_slash takes the queries of all {k_BSGK.shape[1]} keys, here are {length}"
        )
    blocks = -(-length // size)
    vertical, slash = min(vertical, blocks), min(slash, blocks)
    scale = width**-0.5 if scale is None else scale
    weights, distance = _last_weights(q_BLHK[:, -last:], k_BSGK, scale)
    columns = jnp.pad(weights.sum(1), [(0, 0), (0, -length % size)])
    columns = columns.reshape(heads, blocks, size).sum(-1)
    near = jnp.maximum(distance, 0)
    share = weights * (near % size / size)
    diagonals = jnp.zeros((heads, blocks + 1))
    diagonals = diagonals.at[:, near // size].add(weights - share)
    diagonals = diagonals.at[:, near // size + 1].add(share)[:, :blocks]
    columns = _best(columns.at[:, 0].set(jnp.inf), vertical)[:, None]
    diagonals = _best(diagonals.at[:, :2].set(jnp.inf), slash)[:, None]
    row = jnp.arange(blocks)[:, None]
    verticals = jnp.where(columns <= row, columns, -1)
    slashes = row - diagonals
    slashes = jnp.where((slashes[..., None] == columns[:, :, None]).any(-1), -1, slashes)
    return BlockMap(size, jnp.concatenate([verticals, jnp.maximum(slashes, -1)], axis=-1))


def _last_weights(q_BLHK: Array, k_BSGK: Array, scale: float) -> tuple[Array, Array]:
    """Causal attention of the last queries `[H, L, S]`, summed over the batch, and distances."""
    batch, length, heads, width = q_BLHK.shape
    slots, kv_heads = k_BSGK.shape[1:3]
    q = jax.lax.stop_gradient(q_BLHK * scale).transpose(0, 2, 1, 3)
    q = q.reshape(batch, kv_heads, -1, width)
    k = jax.lax.stop_gradient(k_BSGK).transpose(0, 2, 1, 3)
    score = jnp.einsum("bgmk,bgsk->bgms", q, k, preferred_element_type=jnp.float32)
    distance = jnp.arange(slots - length, slots)[:, None] - jnp.arange(slots)
    score = jnp.where(distance >= 0, score.reshape(batch, heads, length, slots), -jnp.inf)
    return jax.nn.softmax(score).sum(0), distance


def _best(sums: Array, count: int) -> Array:
    return jax.lax.top_k(sums, count)[1].astype(jnp.int32)
