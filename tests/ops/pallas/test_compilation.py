"""The kernels of `attend` compiled for TPUs ahead of time: forward and both gradients."""

import jax
import jax.numpy as jnp
import pytest

from lcm.ops.attention import LinearBias, Part, SoftCap, causal, compose, pallas, sinks, window
from lcm.types import Context


def wanted(topology, length, heads, kv_heads, size, dtype, parts):
    """Gradients through causal attention, or two parts of which one has a score modification."""
    shape = lambda *s, dtype=dtype: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    q, k = shape(1, length, heads, size), shape(1, length, kv_heads, size)
    places = shape(1, length, dtype="int32")
    arrays = length * (heads + kv_heads) * size * jnp.dtype(dtype).itemsize
    return {
        "topology": topology,
        "fn": jax.grad(_loss(parts), (0, 1, 2, 3)),
        "args": (q, k, k, shape(heads, dtype="float32"), places, places),
        "kernels": 3,  # forward, queries' gradient, keys' gradient
        # 2 matmuls forward and 7 backward, over the causal half at least
        "flops": 9 * parts * length**2 * heads * size + 1,
        "temporary": 16 * parts * arrays + (64 << 20),  # linear in length
    }


def _loss(parts):
    def loss(q, k, v, slopes, positions, segments):
        where = Context(positions, segments, positions)
        mods = [None, compose(SoftCap(30.0), LinearBias(slopes))][:parts][::-1]
        masks = [causal(), causal() & ~window(1024) & sinks(4)][:parts]
        given = [Part(q, k, mask, mod) for mask, mod in zip(masks, mods, strict=True)]
        out, lse = pallas.attend(tuple(given), v, where, where, 0.1)
        return out.astype(jnp.float32).sum() + lse.sum()

    return loss


def test_kernels_compile_for_a_tpu(compiles):
    compiles(
        wanted,
        [("v5e:2x2", 4096, 4, 2, 128, "bfloat16", 1), ("v6e:2x2", 300, 2, 2, 80, "float32", 2)],
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
