"""Feed-forward layers."""

import jax
from flax import nnx

from lcm.nn.dense import dense, matrix
from lcm.nn.spec import LayerSpec
from lcm.ops.recompute import recomputed
from lcm.types import Array, Hidden


class SwiGLU(nnx.Module):
    """`(silu(x W_gate) * x W_up) W_down` (Shazeer, arXiv:2002.05202)."""

    matrices = 3

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.gate = matrix(rngs, spec.width, spec.hidden)
        self.up = matrix(rngs, spec.width, spec.hidden)
        self.down = matrix(rngs, spec.hidden, spec.width, depth=spec.depth)

    def __call__(self, x_BLD: Hidden) -> Hidden:
        gate, up = dense(x_BLD, self.gate[...]), dense(x_BLD, self.up[...])
        return _gated(gate, up, self.down[...])


class GELU(nnx.Module):
    """`gelu(x W_up) W_down`, with the tanh form of GELU (arXiv:1606.08415)."""

    matrices = 2

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.up = matrix(rngs, spec.width, spec.hidden)
        self.down = matrix(rngs, spec.hidden, spec.width, depth=spec.depth)

    def __call__(self, x_BLD: Hidden) -> Hidden:
        return _activated(dense(x_BLD, self.up[...]), self.down[...])


# The backward pass keeps the matmuls' results and computes what is elementwise again: a third of
# the memory of a layer, and on a CPU memory is time.
@recomputed
def _gated(gate_BLF: Array, up_BLF: Array, down_FD: Array) -> Hidden:
    return dense(jax.nn.silu(gate_BLF) * up_BLF, down_FD)


@recomputed
def _activated(up_BLF: Array, down_FD: Array) -> Hidden:
    return dense(jax.nn.gelu(up_BLF), down_FD)


MLPS: dict[str, type[nnx.Module]] = {"swiglu": SwiGLU, "gelu": GELU}
