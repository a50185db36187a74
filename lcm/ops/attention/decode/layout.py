"""How queries lie in the kernel: one matmul for heads whose keys lie side by side.

The cache holds the G key heads of a token side by side. A matmul takes C of them, W = C K lanes,
at once; the queries of a head have zeros in the lanes of the other heads of its group:

    [q_0  0 ]   [k_0 k_1]^T   =   [q_0 k_0^T]          rows: C heads x H/G queries of each x L
    [ 0  q_1]                     [q_1 k_1^T]

C is the least that fills whole lanes, and more while rows are few: then those of several heads
share a tile of 8, and loading keys into the matrix unit, not zeros, is what takes time.
"""

import dataclasses
import math

import jax.numpy as jnp

from lcm.types import Array

LANES, SUBLANES = 128, 8
FEW = 16  # rows of a group that heads are added up to


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one call, and what follows from them."""

    length: int
    heads: int
    kv_heads: int
    size: int

    @property
    def together(self) -> int:
        """C, heads of a group."""
        whole = LANES // math.gcd(LANES, self.size)
        if self.kv_heads % whole:
            return self.kv_heads
        each = self.heads // self.kv_heads * self.length
        fits = [c for c in range(whole, self.kv_heads + 1, whole) if c * each <= FEW or c == whole]
        return max(c for c in fits if self.kv_heads % c == 0)

    @property
    def groups(self) -> int:
        """G / C."""
        return self.kv_heads // self.together

    @property
    def width(self) -> int:
        """W, lanes of a group."""
        return self.together * self.size

    @property
    def used(self) -> int:
        """Rows of a group that are queries."""
        return self.heads // self.groups * self.length

    @property
    def rows(self) -> int:
        """Rows of a group, in whole sublanes."""
        return -(-self.used // SUBLANES) * SUBLANES

    def spread(self, q_BLHK: Array) -> Array:
        """Queries `[B, groups, rows, W]`, zero in the lanes of other heads."""
        batch, count = q_BLHK.shape[0], self.together
        q = q_BLHK.transpose(0, 2, 1, 3).reshape(batch, self.groups, count, -1, 1, self.size)
        q = jnp.where(jnp.eye(count, dtype=bool)[:, None, :, None], q, 0)
        return self._padded(q.reshape(batch, self.groups, self.used, self.width), 0)

    def collect(self, out: Array) -> Array:
        """What `spread` did, undone: the lanes of a row's own head, `[B, L, H, K]`."""
        batch, count = out.shape[0], self.together
        out = out[:, :, : self.used].reshape(batch, self.groups, count, -1, count, self.size)
        out = jnp.where(jnp.eye(count, dtype=bool)[:, None, :, None], out, 0).sum(4)
        return self.per_query(out.reshape(batch, self.heads, self.length, self.size))

    def per_query(self, x_BHLX: Array) -> Array:
        """`[B, H, L, ...]` as `[B, L, H, ...]`."""
        return x_BHLX.swapaxes(1, 2)

    def columns(self, x_BL: Array, padding: int) -> Array:
        """A number of each query for all its heads, `[B, groups, rows, 1]`."""
        x = jnp.broadcast_to(x_BL[:, None], (x_BL.shape[0], self.heads, self.length))
        return self._padded(x.reshape(-1, self.groups, self.used, 1), padding)

    def head_numbers(self) -> Array:
        """The query head of each row, `[groups, rows, 1]`; 0 for padding."""
        head = jnp.arange(self.heads * self.length, dtype=jnp.int32) // self.length
        return self._padded(head.reshape(1, self.groups, self.used, 1), 0)[0]

    def _padded(self, x: Array, value: int) -> Array:
        missing = self.rows - self.used
        return jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0)), constant_values=value)
