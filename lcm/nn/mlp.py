"""Feed-forward layers."""

import functools
from collections.abc import Callable
from typing import ClassVar

import jax
from flax import nnx

from lcm.nn.bias import add_biases, biased
from lcm.nn.dense import dense, matrix
from lcm.nn.spec import LayerSpec
from lcm.ops.recompute import recomputed
from lcm.types import Array, Hidden

Activation = Callable[[Array], Array]
_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)
_erf_gelu = functools.partial(jax.nn.gelu, approximate=False)


class Dense:
    """An MLP that all tokens go through whole."""

    matrices: ClassVar[int]

    @classmethod
    def flops(cls, spec: LayerSpec) -> float:
        """Matmul FLOPs of one token's forward pass."""
        return 2 * cls.matrices * spec.width * spec.hidden


class Gated(Dense, nnx.Module):
    """`(activation(x W_gate) * x W_up) W_down` (Shazeer, arXiv:2002.05202)."""

    matrices = 3
    activation: ClassVar[Activation]

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.gate = matrix(rngs, spec.width, spec.hidden)
        self.up = matrix(rngs, spec.width, spec.hidden)
        self.down = matrix(rngs, spec.hidden, spec.width, depth=spec.depth)
        add_biases(self, spec.biases, gate=spec.hidden, up=spec.hidden, down=spec.width)

    def __call__(self, x_BLD: Hidden) -> Hidden:
        return self.joined(*self.halves(x_BLD))

    def halves(self, x_BLD: Hidden) -> tuple[Array, Array]:
        """What the activation is applied to, and what its result multiplies, `[B, L, F]`."""
        gate_BLF = biased(self, "gate", dense(x_BLD, self.gate[...]))
        return gate_BLF, biased(self, "up", dense(x_BLD, self.up[...]))

    def joined(self, gate_BLF: Array, up_BLF: Array) -> Hidden:
        """The output of the two halves."""
        run = _gated(type(self).activation)
        return biased(self, "down", run(gate_BLF, up_BLF, self.down[...]))


class SwiGLU(Gated):
    """Gated by SiLU, as in Llama."""

    activation = staticmethod(jax.nn.silu)


class GEGLU(Gated):
    """Gated by the tanh form of GELU, as in Gemma."""

    activation = staticmethod(_tanh_gelu)


class ExactGEGLU(Gated):
    """Gated by GELU by the error function, as in Zamba2."""

    activation = staticmethod(_erf_gelu)


class GELU(Dense, nnx.Module):
    """`gelu(x W_up) W_down`, with the tanh form of GELU (arXiv:1606.08415)."""

    matrices = 2
    activation: ClassVar[Activation] = staticmethod(_tanh_gelu)

    def __init__(self, spec: LayerSpec, rngs: nnx.Rngs):
        self.up = matrix(rngs, spec.width, spec.hidden)
        self.down = matrix(rngs, spec.hidden, spec.width, depth=spec.depth)
        add_biases(self, spec.biases, up=spec.hidden, down=spec.width)

    def __call__(self, x_BLD: Hidden) -> Hidden:
        up = biased(self, "up", dense(x_BLD, self.up[...]))
        return biased(self, "down", _activated(type(self).activation)(up, self.down[...]))


class ExactGELU(GELU):
    """With GELU by the error function, as in GPT-NeoX."""

    activation = staticmethod(_erf_gelu)


# The backward pass keeps the matmuls' results and computes what is elementwise again: a third of
# the memory of a layer, and on a CPU memory is time.
def _gated(activation: Activation) -> Callable[[Array, Array, Array], Hidden]:
    def run(gate_BLF: Array, up_BLF: Array, down_FD: Array) -> Hidden:
        return dense(activation(gate_BLF) * up_BLF, down_FD)

    return recomputed(run)


def _activated(activation: Activation) -> Callable[[Array, Array], Hidden]:
    def run(up_BLF: Array, down_FD: Array) -> Hidden:
        return dense(activation(up_BLF), down_FD)

    return recomputed(run)


class NoMLP(Dense):
    """None: a layer of the mixer alone, as in Mamba."""

    matrices = 0


# Those of one piece; all there are, with experts, stand in lcm.nn.block.
DENSE: dict[str, type] = {
    "swiglu": SwiGLU,
    "geglu": GEGLU,
    "geglu_exact": ExactGEGLU,
    "gelu": GELU,
    "gelu_exact": ExactGELU,
    "none": NoMLP,
}
