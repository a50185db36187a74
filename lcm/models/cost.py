"""What a model costs, in closed form: parameters, FLOPs, bytes of state."""

import math

import jax
import jax.numpy as jnp

from lcm import nn
from lcm.models import decoder
from lcm.models.spec import ModelSpec


def parameters(spec: ModelSpec) -> int:
    """Number of parameters."""
    shapes = decoder.shapes(spec)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def flops_per_token(spec: ModelSpec, length: int) -> float:
    """Matmul FLOPs of training on one token: forward, and twice that backward.

    Mean over a causal sequence of `length` tokens, counting the keys that are visible, so about
    half of the 12 L D per layer of PaLM's appendix B at full attention. Recomputation (remat) is
    not counted, as in model FLOPs utilisation.
    """
    layers = sum(spec.count(i) * nn.flops(layer, length) for i, layer in enumerate(spec.layers))
    return 3 * (layers + 2 * spec.width * spec.vocab)


def state_bytes_per_token(spec: ModelSpec) -> int:
    """Bytes by which the decoding state of one sequence grows with each token it holds."""
    itemsize = jnp.dtype(spec.dtype).itemsize
    return sum(
        spec.count(i) * nn.MIXERS[layer.mixer].state_bytes(layer, itemsize)
        for i, layer in enumerate(spec.layers)
    )
