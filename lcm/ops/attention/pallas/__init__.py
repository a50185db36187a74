"""Attention kernels for TPUs: forward, queries' gradient, keys' and values' gradient.

`api` lays arrays out and holds the differentiation rule, `plan` what is known before tracing,
`tiles` and `visits` which tiles are computed, with and without block maps, `walk` how a grid goes
over them, `maps` what a map lists of a tile.
"""

from lcm.ops.attention.pallas.api import attend, fits

__all__ = ["attend", "fits"]
