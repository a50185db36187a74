"""The kernels of `attend` compiled for TPUs ahead of time: forward and both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm.ops.attention import (
    BlockMap,
    LinearBias,
    Part,
    SoftCap,
    causal,
    compose,
    pallas,
    sinks,
    window,
)
from lcm.types import Context


def wanted(topology, length, heads, kv_heads, size, dtype, parts, *extras):
    """Gradients through causal attention, or two parts of which one has a score modification.

    extras: "table" looks scores up by distance, "map" gives parts block maps.
    """
    shape = lambda *s, dtype=dtype: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    q, k = shape(1, length, heads, size), shape(1, length, kv_heads, size)
    places = shape(1, length, dtype="int32")
    arrays = length * (heads + kv_heads) * size * jnp.dtype(dtype).itemsize
    # 2 matmuls forward and 7 backward, over the causal half at least; a map leaves less
    flops = 0 if "map" in extras else 9 * parts * length**2 * heads * size + 1
    return {
        "topology": topology,
        "fn": jax.grad(_loss(parts, extras), (0, 1, 2, 3)),
        "args": (q, k, k, shape(heads, dtype="float32"), places, places),
        "kernels": 3,  # forward, queries' gradient, keys' gradient
        "flops": flops,
        "temporary": 16 * parts * arrays + (64 << 20),  # linear in length
    }


def _loss(parts, extras):
    def loss(q, k, v, slopes, positions, segments):
        where = Context(positions, segments, positions)
        mods = [None, compose(SoftCap(30.0), LinearBias(slopes))][:parts][::-1]
        masks = [causal(), causal() & ~window(1024) & sinks(4)][:parts]
        if "table" in extras:
            table = jnp.broadcast_to(slopes, (200, slopes.size))
            mods = [jax.tree_util.Partial(_by_distance, table), None][:parts]
        maps = _maps(q.shape[1]) if "map" in extras else [None, None]
        rows = zip(masks, mods, maps[:parts], strict=True)
        given = [Part(q, k, mask, mod, blocks) for mask, mod, blocks in rows]
        out, lse = pallas.attend(tuple(given), v, where, where, 0.1)
        return out.astype(jnp.float32).sum() + lse.sum()

    return loss


def _by_distance(table, score, q_pos, k_pos, head):
    return score * table[jnp.clip(q_pos - k_pos, 0, 199), head]


def _maps(length):
    """Three blocks of 96 a row, drawn for each of four heads and for all."""
    rows, draws = -(-length // 96), np.random.default_rng(0)
    return [BlockMap(96, draws.integers(-1, rows, (h, rows, 3), np.int32)) for h in (4, 1)]


def test_kernels_compile_for_a_tpu(compiles):
    compiles(
        wanted,
        [("v5e:2x2", 4096, 4, 2, 128, "bfloat16", 1), ("v6e:2x2", 300, 2, 2, 80, "float32", 2)],
    )


@pytest.mark.slow
def test_lookups_and_maps_compile_for_a_tpu(compiles):
    compiles(
        wanted,
        [
            ("v5e:2x2", 512, 4, 2, 128, "bfloat16", 1, "table"),
            ("v6e:2x2", 300, 4, 2, 64, "float32", 2, "table", "map"),
            ("v5e:2x2", 1000, 4, 1, 128, "bfloat16", 2, "map"),
        ],
    )


@pytest.mark.slow
def test_lookups_and_maps_compile_everywhere(compiles, topology):
    sizes = (2048, 128, "bfloat16"), (1000, 80, "float32")
    compiles(
        wanted,
        [
            (topology, n, 4, 2, size, dtype, 2, extra)
            for n, size, dtype in sizes
            for extra in ("table", "map")
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128, 256])
def test_kernels_compile_at_all_lengths(compiles, topology, size):
    lengths = 4096, 32768, 131072
    compiles(
        wanted, [(topology, n, 2, 1, size, "bfloat16", 1 + (n == lengths[0])) for n in lengths]
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 33, 80, 192, 256])
def test_kernels_compile_at_odd_sizes(compiles, size):
    compiles(wanted, [("v5e:2x2", n, 2, 1, size, "float32", 2) for n in (1, 1000)])
