"""Attention kernels for TPUs: forward, queries' gradient, keys' and values' gradient.

`api` lays arrays out and holds the differentiation rule, `plan` what is known before tracing,
`tiles` which tiles are computed, `modification` how score modifications enter a kernel.
"""

from lcm.ops.attention.pallas.api import attend

__all__ = ["attend"]
