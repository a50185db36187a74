"""Block maps: which blocks of keys each block of queries may see, linear in length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lcm.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMap:
    """Query block `i` sees key blocks `indices_HQN[:, i]`, as far as the mask and segments allow.

    Blocks are of `size` slots and counted by slot from 0, whatever the positions; the last one may
    be shorter. -1 stands for no block, a block listed twice counts once.

    size: tokens of a block.
    indices_HQN: int32, N key blocks for each block of queries, for each head or (H = 1) for all.
    full: query blocks that see every key block and whose own list is ignored. A few rows that see
        everything would otherwise make N, and with it the map, as large as the square of length.
    """

    size: int = dataclasses.field(metadata={"static": True})
    indices_HQN: Array
    full: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    def clean(self, slots: int) -> "BlockMap":
        """The map with -1 for blocks that are beyond `slots` or stand earlier in their row.

        In NumPy where the map is: what it lists then stays known before it runs.
        """
        xp = np if isinstance(self.indices_HQN, np.ndarray) else jnp
        indices = xp.asarray(self.indices_HQN)
        n = np.arange(indices.shape[-1])
        same = indices[..., :, None] == indices[..., None, :]
        again = (same & (n[:, None] > n)).any(-1)
        known = (indices >= 0) & (indices < -(-slots // self.size))
        return dataclasses.replace(self, indices_HQN=xp.where(known & ~again, indices, -1))

    def shows(self, q_slots: Array, slots: int) -> Array:
        """The map for queries at `q_slots` as a dense bool `[H, L, S]`."""
        blocks = -(-slots // self.size)
        rows = jnp.asarray(self.indices_HQN)[:, q_slots // self.size]
        heads, length, _ = rows.shape
        at = jnp.arange(heads)[:, None, None], jnp.arange(length)[:, None]
        listed = jnp.zeros((heads, length, blocks + 1), bool)
        listed = listed.at[(*at, jnp.where(rows < 0, blocks, rows))].set(True)
        full = jnp.isin(q_slots // self.size, jnp.asarray(self.full, jnp.int32))
        listed = listed[..., :blocks] | full[:, None]
        return jnp.repeat(listed, self.size, axis=-1)[..., :slots]

    def check(self, length: int, slots: int, heads: int) -> None:
        """Raise a `ValueError` unless the map is for `length` queries, `slots` keys and `heads`."""
        shape, rows = self.indices_HQN.shape, -(-length // self.size)
        if len(shape) != 3 or not jnp.issubdtype(self.indices_HQN.dtype, jnp.integer):
            raise ValueError(
                f"indices of a block map are {self.indices_HQN.dtype} {shape}: they must be "
                "integers of 3 axes [H, Q, N], heads, query blocks, key blocks seen"
            )
        if shape[1] != rows:
            raise ValueError(
                f"a block map of {shape[1]} blocks of {self.size} is not for {length} queries: "
                f"build it for {rows} blocks"
            )
        if shape[0] not in (1, heads):
            raise ValueError(
                f"a block map of {shape[0]} heads is not for {heads}: give it 1 or {heads}"
            )
        if not all(0 <= row < rows for row in self.full):
            raise ValueError(f"full rows {self.full} of a block map are not all in 0..{rows - 1}")
