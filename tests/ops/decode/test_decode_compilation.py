"""The kernel of `decode` compiled for TPUs ahead of time."""

import jax
import jax.numpy as jnp
import pytest

from lcm.ops.attention import LinearBias, SoftCap, causal, compose, window
from lcm.ops.attention.decode import Rotation, contiguous, kernel

BATCH = 4


def wanted(topology, slots, page, length, heads, kv_heads, size, dtype, *extras):
    """Decoding, with a window of 1000, a score modification or a rotation among the extras."""

    def run(q, cache, slopes, inv_freq):
        mask = causal() & window(1000) if "window" in extras else causal()
        mod = compose(SoftCap(30.0), LinearBias(slopes)) if "mod" in extras else None
        rotation = Rotation(inv_freq, 1.1) if "rotation" in extras else None
        return kernel.decode(q, cache, mask, mod, rotation, 0.1)

    shape = jax.ShapeDtypeStruct
    cache = jax.eval_shape(lambda: contiguous(BATCH, slots, kv_heads, size, dtype, page))
    q = shape((BATCH, length, heads, size), "bfloat16" if dtype == "int8" else dtype)
    keys = BATCH * slots * kv_heads * size * jnp.dtype(dtype).itemsize
    seen = min(slots, 1000) if "window" in extras else slots
    return {
        "topology": topology,
        "fn": run,
        "args": (q, cache, shape((heads,), "float32"), shape((size // 2,), "float32")),
        "kernels": 1,
        "flops": 4 * BATCH * length * heads * size * seen,
        "temporary": keys / 8 + (16 << 20),  # no copy of the cache
    }


def test_kernel_compiles_for_a_tpu(compiles):
    cases = [
        ("v5e:2x2", 4096, 128, 1, 32, 8, 128, "bfloat16", "window"),
        ("v6e:2x2", 4096, 64, 3, 8, 4, 64, "int8", "mod", "rotation"),
    ]
    compiles(wanted, cases)


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128, 256])
def test_kernel_compiles_at_all_lengths(compiles, topology, size):
    kinds = [
        (64, 1, "bfloat16"),
        (128, 16, "bfloat16", "window"),
        (256, 1, "int8", "mod"),
        (512, 4, "float32", "rotation"),
        (16, 2, "bfloat16", "rotation", "mod"),
    ]
    compiles(
        wanted,
        [
            (topology, slots, page, length, 16, 8, size, dtype, *extras)
            for slots in (4096, 32768, 131072)
            for page, length, dtype, *extras in kinds
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 33, 48, 80, 96, 192])
def test_kernel_compiles_at_odd_sizes(compiles, size):
    compiles(
        wanted,
        [
            ("v5e:2x2", 1024, page, length, heads, kv_heads, size, dtype, extra)
            for heads, kv_heads, length in ((1, 1, 1), (6, 3, 5), (16, 8, 16))
            for page, dtype, extra in ((8, "float32", "mod"), (32, "int8", "rotation"))
        ],
    )
