"""Kernels compiled for TPUs ahead of time, in a process of their own with libtpu.

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
import json, sys, jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from lcm.ops.attention import (
    BlockMap, LinearBias, Part, SoftCap, causal, compose, pallas, sinks, window
)
from lcm.types import Context

def by_distance(table, score, q_pos, k_pos, head):
    return score * table[jnp.clip(q_pos - k_pos, 0, 199), head]

def loss(q, k, v, slopes, positions, segments, parts, extras):
    where = Context(positions, segments, positions)
    mods = [None, compose(SoftCap(30.0), LinearBias(slopes))][:parts][::-1]
    masks = [causal(), causal() & ~window(1024) & sinks(4)][:parts]
    if "table" in extras:
        table = jnp.broadcast_to(slopes, (200, slopes.size))
        mods = [jax.tree_util.Partial(by_distance, table), None][:parts]
    maps = [None, None]
    if "map" in extras:
        rows, listed = -(-q.shape[1] // 96), np.random.default_rng(0)
        maps = [BlockMap(96, listed.integers(-1, rows, (h, rows, 3), np.int32)) for h in (4, 1)]
    given = [Part(q, k, mask, mod, blocks) for mask, mod, blocks in zip(masks, mods, maps)]
    out, lse = pallas.attend(tuple(given), v, where, where, 0.1)
    return out.astype(jnp.float32).sum() + lse.sum()

for topology, length, heads, kv_heads, size, dtype, parts, *extras in json.loads(sys.argv[1]):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    on = jax.sharding.SingleDeviceSharding(devices[0])
    shape = lambda *s, dtype=dtype: jax.ShapeDtypeStruct(s, dtype, sharding=on)
    q, k = shape(1, length, heads, size), shape(1, length, kv_heads, size)
    places = shape(1, length, dtype="int32")
    grad = jax.jit(jax.grad(loss, (0, 1, 2, 3)), static_argnums=(6, 7))
    slopes, extras = shape(heads, dtype="float32"), tuple(extras)
    traced = grad.trace(q, k, k, slopes, places, places, parts, extras)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    print(json.dumps(dict(
        kernels=compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        flops=compiled.cost_analysis()["flops"],
        temporary=compiled.memory_analysis().temp_size_in_bytes,
    )))
"""


def compiled(*cases):
    """What the compiler says of gradients through `attend`, one record a case."""
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


def check(cases):
    for (_, length, heads, kv_heads, size, dtype, parts, *extras), record in zip(
        cases, compiled(*cases), strict=True
    ):
        width = 2 if dtype == "bfloat16" else 4
        arrays = length * (heads + kv_heads) * size * width
        assert record["kernels"] == 3  # forward, queries' gradient, keys' gradient
        if "map" not in extras:  # 2 matmuls forward and 7 backward, over the causal half at least
            assert record["flops"] > 9 * parts * length**2 * heads * size
        assert record["temporary"] < 16 * parts * arrays + (64 << 20)  # linear in length


def test_kernels_compile_for_a_tpu():
    check([("v5e:2x2", 4096, 4, 2, 128, "bfloat16", 1), ("v6e:2x2", 300, 2, 2, 80, "float32", 2)])


def test_lookups_and_maps_compile_for_a_tpu():
    check(
        [
            ("v5e:2x2", 512, 4, 2, 128, "bfloat16", 1, "table"),
            ("v6e:2x2", 300, 4, 2, 64, "float32", 2, "table", "map"),
            ("v5e:2x2", 1000, 4, 1, 128, "bfloat16", 2, "map"),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_lookups_and_maps_compile_everywhere(topology):
    check(
        [
            (topology, n, 4, 2, size, dtype, 2, *extras)
            for n, size, dtype in ((2048, 128, "bfloat16"), (1000, 80, "float32"))
            for extras in (["table"], ["map"])
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kernels_compile_at_all_lengths(topology, size):
    check([(topology, n, 2, 1, size, "bfloat16", 1 + (n == 4096)) for n in (4096, 32768, 131072)])


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 33, 80, 192, 256])
def test_kernels_compile_at_odd_sizes(size):
    check([("v5e:2x2", n, 2, 1, size, "float32", 2) for n in (1, 1000)])
