"""Biases of a layer's matrices, by the names that `model.biases` may have."""

import jax.numpy as jnp
from flax import nnx

from lcm.types import Array

_ATTENTION, _MLP = frozenset({"q", "k", "v", "out"}), frozenset({"gate", "up", "down"})
_RECURRENT = frozenset({"b", "c", "x", "y", "conv"})  # branches of a block, what it convolves
# The matrices that have a bias: none, as in Llama; qkv, as in Qwen2; all, as in GPT-NeoX.
BIASES: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "qkv": _ATTENTION - {"out"},
    "attention": _ATTENTION,
    "mlp": _MLP,
    "but_qkv": frozenset({"out"}) | _MLP | _RECURRENT,  # as in RecurrentGemma
    "mixer": _ATTENTION | _RECURRENT,  # as in LFM2
    "all": _ATTENTION | _MLP | _RECURRENT,
}


def add_biases(module: nnx.Module, biases: str, **sizes: int) -> None:
    """Gives a module a parameter `NAME_bias`, zeros of the size given, for each that has one."""
    for name, size in sizes.items():
        if name in BIASES[biases]:
            setattr(module, f"{name}_bias", nnx.Param(jnp.zeros(size)))


def biased(module: nnx.Module, name: str, y: Array) -> Array:
    """What came out of a matrix, plus its bias if it has one."""
    bias = getattr(module, f"{name}_bias", None)
    return y if bias is None else y + bias[...].astype(y.dtype)
