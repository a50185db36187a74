"""Text to packed batches: sources, tokenizers, packing, and the grain pipeline around them.

`lcm.data.pipeline` is the face of it; this module stays light, so that a command line can list the
keys of `data` without importing jax or grain.
"""

from lcm.data.settings import defaults

__all__ = ["defaults"]
