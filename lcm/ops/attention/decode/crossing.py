"""What a score modification takes into the kernel for decoding, put in and taken out again.

A number for all rows goes through scalar memory, one for each row as a column beside the others,
tables next to each other along lanes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lcm.ops.attention.decode.layout import LANES
from lcm.ops.attention.modification import Modification, Split, is_column, is_floating
from lcm.ops.attention.score import ScoreMod
from lcm.types import Array

Ref = Any


def crossing(
    static: Modification, split: Split, mod: ScoreMod, q_pos: Array, head: Array
) -> tuple[list[Array], list[Array]]:
    """Scalars and columns `[B, groups, rows, 1]` of a modification, and its tables, of lanes."""
    if split.lookups:
        shape = next(iter(split.lookups.values())).operand.aval.shape
        raise ValueError(
            f"score modification {static.name} looks up an array of shape {shape} by the position "
            'of a key, which the kernel for decoding does not: use backend="reference"'
        )
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(mod)]
    head = jnp.broadcast_to(head, q_pos.shape)
    tiles = (x.reshape(-1, *q_pos.shape[-2:]) for x in (head, q_pos))
    numbers, tables = jax.vmap(lambda head, q_pos: split.cross(*leaves, head, q_pos))(*tiles)
    shape = q_pos.shape[:-1]
    return (
        [
            x.reshape(*shape, 1) if is_column(aval) else x[0].reshape(())
            for x, aval in zip(numbers, split.numbers, strict=True)
        ],
        [jnp.broadcast_to(x, (len(x), shape[-1], x.shape[-1])).reshape(*shape, -1) for x in tables],
    )


def packed(scalars: list[Array], floating: bool) -> Array:
    """Numbers of a score modification that are for all rows, never an empty array."""
    dtype = jnp.float32 if floating else jnp.int32
    some = [x for x in scalars if jnp.issubdtype(x.dtype, jnp.floating) == floating]
    return jnp.stack([x.astype(dtype) for x in some] or [jnp.zeros((), dtype)])


def given(
    split: Split, scalars: Sequence[Ref], integers: Array, real: Sequence[Array]
) -> Iterator[Array]:
    """What crosses into the kernel, in order, from where `decode` put it."""
    at = {"integer": iter(range(LANES)), "float": iter(range(LANES))}
    scalar_at = {"integer": iter(range(LANES)), "float": iter(range(LANES))}
    for aval in split.numbers:
        kind = "float" if is_floating(aval) else "integer"
        if is_column(aval):
            n = next(at[kind])
            yield (real[0] if kind == "float" else integers)[:, n : n + 1]
        else:
            yield scalars[kind == "float"][next(scalar_at[kind])]


def tables(split: Split, looked_up: Sequence[Ref], group: int) -> Iterator[Array]:
    """Tables of a group's rows, next to each other along lanes."""
    at = 0
    for width in split.lanes:
        yield looked_up[0][group, :, at : at + width]
        at += width


def has_real_columns(split: Split) -> bool:
    """Whether a column of floats crosses."""
    return any(is_column(aval) and is_floating(aval) for aval in split.numbers)
