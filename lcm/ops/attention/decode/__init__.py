"""Attention of a few new tokens to a cache of keys and values in pages.

`cache` holds the pages and appends to them, `rotation` rotates keys that are cached raw, `api`
checks arguments and calls a backend: `reference`, which is to be read, or `kernel` for TPUs, for
which `layout` puts heads side by side and `modification` splits score modifications; `sharded`
gives each device of a mesh its rows and heads.

Further letters of shapes: P pages, T tokens of a page, N pages of a row, R rotated pairs,
M = G K numbers of a token.
"""

from lcm.ops.attention.decode.api import BACKENDS, QUERIES, decode
from lcm.ops.attention.decode.cache import Cache, append, contiguous, paged
from lcm.ops.attention.decode.rotation import Rotation

__all__ = ["BACKENDS", "QUERIES", "Cache", "Rotation", "append", "contiguous", "decode", "paged"]
