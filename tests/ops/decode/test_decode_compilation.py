"""The kernel compiled for TPUs ahead of time, in a process of its own with libtpu.

An error of the compiler (vector memory, layout, an operation it lacks) shows here as on a chip.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
TOPOLOGIES = "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"

PROGRAM = """
import json, sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from lcm.ops.attention import LinearBias, SoftCap, causal, compose, window
from lcm.ops.attention.decode import Rotation, contiguous, kernel

def run(q, cache, slopes, inv_freq, extras):
    mask = causal() & window(1000) if "window" in extras else causal()
    mod = compose(SoftCap(30.0), LinearBias(slopes)) if "mod" in extras else None
    rotation = Rotation(inv_freq, 1.1) if "rotation" in extras else None
    return kernel.decode(q, cache, mask, mod, rotation, 0.1)

for topology, slots, page, length, heads, kv_heads, size, dtype, extras in json.loads(sys.argv[1]):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    on = jax.sharding.SingleDeviceSharding(devices[0])
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on)
    cache = jax.eval_shape(lambda: contiguous(4, slots, kv_heads, size, dtype, page))
    queries = "bfloat16" if dtype == "int8" else dtype
    q = jax.ShapeDtypeStruct((4, length, heads, size), queries)
    slopes, inv_freq = (jax.ShapeDtypeStruct((n,), "float32") for n in (heads, size // 2))
    args = jax.tree.map(shape, (q, cache, slopes, inv_freq))
    traced = jax.jit(run, static_argnums=4).trace(*args, tuple(extras))
    try:
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except Exception as error:
        print(json.dumps(dict(error=str(error)[:2000])))
        continue
    print(json.dumps(dict(
        kernels=compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        flops=compiled.cost_analysis()["flops"],
        temporary=compiled.memory_analysis().temp_size_in_bytes,
    )))
"""


def compiled(*cases):
    """What the compiler says of each case, one record a case."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'jax[tpu]' to compile for TPUs here")
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(cases)]
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, env=kept | settings, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(records) == len(cases)
    return records


def check(*cases):
    failed = []
    for case, record in zip(cases, compiled(*cases), strict=True):
        _, slots, _, length, heads, kv_heads, size, dtype, extras = case
        if "error" in record:
            failed.append((case, record["error"]))
            continue
        width = {"int8": 1, "bfloat16": 2, "float32": 4}[dtype]
        cache = 4 * slots * kv_heads * size * width  # of keys
        seen = min(slots, 1000) if "window" in extras else slots
        assert record["kernels"] == 1
        assert record["flops"] >= 4 * 4 * length * heads * size * seen
        assert record["temporary"] < cache / 8 + (16 << 20)  # no copy of the cache
    assert not failed, "\n".join(f"{case}: {error}" for case, error in failed)


def test_kernel_compiles_for_a_tpu():
    check(
        ["v5e:2x2", 4096, 128, 1, 32, 8, 128, "bfloat16", ["window"]],
        ["v6e:2x2", 4096, 64, 3, 8, 4, 64, "int8", ["mod", "rotation"]],
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kernel_compiles_at_all_lengths(topology, size):
    check(
        *(
            [topology, slots, page, length, 16, 8, size, dtype, extras]
            for slots in (4096, 32768, 131072)
            for page, length, dtype, extras in (
                (64, 1, "bfloat16", []),
                (128, 16, "bfloat16", ["window"]),
                (256, 1, "int8", ["mod"]),
                (512, 4, "float32", ["rotation"]),
                (16, 2, "bfloat16", ["rotation", "mod"]),
            )
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 33, 48, 80, 96, 192])
def test_kernel_compiles_at_odd_sizes(size):
    check(
        *(
            ["v5e:2x2", 1024, page, length, heads, kv_heads, size, dtype, extras]
            for heads, kv_heads, length in ((1, 1, 1), (6, 3, 5), (16, 8, 16))
            for page, dtype, extras in ((8, "float32", ["mod"]), (32, "int8", ["rotation"]))
        )
    )
