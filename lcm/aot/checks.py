"""Regressions that a compiled program shows, by name."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import Mesh

from lcm import models
from lcm.aot import flops, hlo
from lcm.aot.program import Program
from lcm.models import decoder

WIDE_SHARE = 0.02  # of a program's FLOPs that may be of float32 products, where it is not one


def findings(cfg: Any, mesh: Mesh, program: Program, module: hlo.Module) -> Iterator[str]:
    """What is wrong with a program, as `name: what`."""
    spec = models.spec(cfg)
    yield from stacked_gathers(module, _stacked(spec, mesh))
    length = cfg.data.length // mesh.shape["context"]
    if length not in _widths(spec):  # else an axis of that size may be one of channels
        yield from square_arrays(module, length)
    if spec.dtype != jnp.float32:
        yield from wide_products(program.jaxpr)


def _widths(spec: models.ModelSpec) -> set[int]:
    """Sizes of axes that are none of tokens."""
    layers = [(each.hidden, each.inner, each.heads * each.head_size) for each in spec.layers]
    return {spec.width, spec.vocab, *(size for layer in layers for size in layer)}


def _stacked(spec: models.ModelSpec, mesh: Mesh) -> set[tuple[int, int]]:
    """Layers of each stack of parameters, and the numbers that a device has once it is gathered."""
    shapes = decoder.shapes(spec)["layers"]
    leaves = jax.tree.leaves(shapes)
    cuts = {1, mesh.shape["tensor"]}
    return {(x.shape[0], x.size // cut) for x in leaves for cut in cuts if x.shape[0] > 1}


def stacked_gathers(module: hlo.Module, stacks: set[tuple[int, int]]) -> Iterator[str]:
    """`parameter-gather`: weights of all layers are gathered at once, not those of one.

    A stack is known by its layers and its size: one layer may have as many heads as there are
    layers.
    """
    for op in module.ops():
        if op.kind not in ("all-gather", "all-gather-start"):
            continue
        for dims in hlo.dimensions(op.shape):
            if len(dims) >= 3 and (dims[0], math.prod(dims)) in stacks and math.prod(dims) >= 2**20:
                yield f"parameter-gather: {op.name} gathers {dims} of all layers at once"
                break


def square_arrays(module: hlo.Module, length: int) -> Iterator[str]:
    """`square-array`: something has two axes of the sequence, as attention must not."""
    if length < 1024:
        return
    seen = set()
    for op in module.ops():
        for dims in hlo.dimensions(op.shape):
            if sum(each == length for each in dims) >= 2 and dims not in seen:
                seen.add(dims)
                yield f"square-array: {op.name} is {dims}, {length} being the tokens of a row"


def wide_products(jaxpr: core.Jaxpr) -> Iterator[str]:
    """`float32-matmul`: products of float32 in a model that computes in less."""
    total, wide = flops.of(jaxpr), flops.of(jaxpr, only=jnp.float32)
    if wide.matmul > WIDE_SHARE * total.flops:
        share = 100 * wide.matmul / total.flops
        yield f"float32-matmul: {share:.1f} % of all FLOPs are of float32 products"
