"""Joints of a transducer: scores of blank and labels from a frame and the labels before."""

import jax.numpy as jnp
from flax import nnx

from lcm.nn.dense import matrix
from lcm.types import Array


class SumJoint(nnx.Module):
    """`f_t + g_u`, each projected to the symbols (Graves, 2012, arXiv:1211.3711)."""

    def __init__(self, frames: int, labels: int, vocab: int, rngs: nnx.Rngs):
        self.f = matrix(rngs, frames, vocab)
        self.g = matrix(rngs, labels, vocab)
        self.bias = nnx.Param(jnp.zeros(vocab))

    def __call__(self, f: Array, g: Array) -> Array:
        wide = f.astype(jnp.float32) @ self.f[...] + g.astype(jnp.float32) @ self.g[...]
        return wide + self.bias[...]


class TanhJoint(nnx.Module):
    """`W tanh(A f_t + B g_u + b)`, as wide as the frames (Graves et al., 2013, arXiv:1303.5778)."""

    def __init__(self, frames: int, labels: int, vocab: int, rngs: nnx.Rngs):
        self.f = matrix(rngs, frames, frames)
        self.g = matrix(rngs, labels, frames)
        self.bias = nnx.Param(jnp.zeros(frames))
        self.out = matrix(rngs, frames, vocab)

    def __call__(self, f: Array, g: Array) -> Array:
        wide = f.astype(jnp.float32) @ self.f[...] + g.astype(jnp.float32) @ self.g[...]
        return jnp.tanh(wide + self.bias[...]) @ self.out[...]


JOINTS: dict[str, type[nnx.Module]] = {"sum": SumJoint, "tanh": TanhJoint}
