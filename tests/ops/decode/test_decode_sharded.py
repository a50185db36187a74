"""Decoding under a mesh: each device has its rows and heads, and the whole is as on one device."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcm import aot
from lcm.ops.attention import LinearBias
from lcm.ops.attention.decode import contiguous, decode, paged

PROGRAM = """
import dataclasses, json, sys, jax, jax.numpy as jnp, numpy as np
import decode_cases as cases
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from lcm.ops.attention import causal, window
from lcm.ops.attention.decode import BACKENDS, Rotation, decode, kernel
from lcm.ops.attention.decode.cache import quantised

given = json.loads(sys.argv[1])
kernel.interpret, kernel.TOKENS = True, 64
BACKENDS["pallas"] = BACKENDS["pallas"]._replace(platforms=("cpu",))
heads, kv_heads, shuffled = given["heads"], given["kv_heads"], given["shuffled"]
rows = cases.documents(given["lengths"], kv_heads, 16)
q = jnp.asarray(cases.queries(len(rows), 2, heads, 16))
cache = cases.filled(rows, 2, 32, shuffled=shuffled)
if given["int8"]:
    split = lambda x: quantised(x.reshape(*x.shape[:2], kv_heads, 16))
    (k, k_scale), (v, v_scale) = split(cache.k_PTM), split(cache.v_PTM)
    cache = dataclasses.replace(
        cache, k_PTM=k.reshape(cache.k_PTM.shape), v_PTM=v.reshape(cache.v_PTM.shape),
        k_scale_PGT=k_scale.swapaxes(1, 2), v_scale_PGT=v_scale.swapaxes(1, 2),
    )
mod = cases.Logarithm(jnp.linspace(0.0, 1.0, heads))
rotation = Rotation(100.0 ** -jnp.linspace(0, 1, 8), 1.1) if given["rotation"] else None
mask = causal() & window(40)

def run(q, cache, mod, rotation):
    return decode(q, cache, mask=mask, score_mod=mod, rotation=rotation, backend=given["backend"])

given["backend"] = "reference"
expected = run(q, cache, mod, rotation)
given["backend"] = "pallas"
alone = jax.jit(run)(q, cache, mod, rotation)
shape = given["mesh"]
mesh = jax.make_mesh(shape, ("data", "fsdp", "context", "tensor"), axis_types=(AxisType.Auto,) * 4)
owned = None if shuffled or len(rows) % (shape[0] * shape[1]) else ("data", "fsdp")
along = "tensor" if kv_heads % shape[3] == 0 else None
place = lambda x, *axes: None if x is None else jax.device_put(x, NamedSharding(mesh, P(*axes)))
cache = dataclasses.replace(
    cache,
    k_PTM=place(cache.k_PTM, owned, None, along),
    v_PTM=place(cache.v_PTM, owned, None, along),
    k_scale_PGT=place(cache.k_scale_PGT, owned, along),
    v_scale_PGT=place(cache.v_scale_PGT, owned, along),
)
with jax.set_mesh(mesh):
    meshed = jax.jit(run).lower(q, cache, mod, rotation).compile()
    moved = [line for line in meshed.as_text().splitlines() if "all-gather(" in line]
    meshed = meshed(q, cache, mod, rotation)
for a, b, c in zip(expected, alone, meshed, strict=True):
    np.testing.assert_allclose(b, c, atol=1e-6)
    np.testing.assert_allclose(a, c, atol=1e-4)
print(json.dumps([meshed.out_BLHK.sharding.shard_shape(q.shape), len(moved)]))
"""
LENGTHS = (0, 13, 75, 40)
CASES = {
    "rows and heads, contiguous": (
        {"mesh": (2, 1, 2, 2), "heads": 4, "kv_heads": 2, "rotation": True},
        (2, 2, 2, 16),
    ),
    "rows over two axes, a pool": (
        {"mesh": (2, 2, 1, 2), "heads": 4, "kv_heads": 2, "shuffled": True},
        (1, 2, 2, 16),
    ),
    "int8 in a pool": (
        {"mesh": (2, 1, 1, 4), "heads": 4, "kv_heads": 4, "shuffled": True, "int8": True},
        (2, 2, 1, 16),
    ),
    "one key head for all": (
        {"mesh": (1, 2, 1, 4), "heads": 8, "kv_heads": 1, "rotation": True},
        (2, 2, 2, 16),
    ),
    "int8, a key head for two devices": (
        {"mesh": (2, 1, 1, 4), "heads": 8, "kv_heads": 2, "int8": True, "rotation": True},
        (2, 2, 2, 16),
    ),
    "rows that do not divide": (
        {"mesh": (4, 1, 1, 2), "heads": 4, "kv_heads": 4, "lengths": LENGTHS[:3]},
        (3, 2, 2, 16),
    ),
    "heads that do not divide": (
        {"mesh": (2, 1, 1, 4), "heads": 6, "kv_heads": 3, "shuffled": True},
        (2, 2, 6, 16),
    ),
}


@pytest.mark.quick("int8, a key*")
@pytest.mark.parametrize("name", CASES)
def test_a_mesh_changes_nothing(name):
    """Nor are pages gathered that lie where they belong."""
    changes, shard = CASES[name]
    given = {"lengths": LENGTHS, "shuffled": False, "int8": False, "rotation": False, **changes}
    settings = {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": f"{os.environ['PYTHONPATH']}{os.pathsep}{pathlib.Path(__file__).parent}",
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(given)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    assert json.loads(done.stdout) == [list(shard), 0]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is missing: nothing is compiled for TPUs; pip install 'jax[tpu]'",
)
@pytest.mark.parametrize(
    "topology, shape, dtype, table",
    [("v5e:2x2", (2, 2), jnp.bfloat16, False), ("v6e:2x2", (1, 4), jnp.int8, True)],
)
def test_a_mesh_of_tpus_decodes_where_the_pages_lie(topology, shape, dtype, table):
    """32 query and 8 key heads of 128, 16 rows of 4096 tokens."""
    mesh = aot.mesh(topology, shape, ("data", "tensor"))
    numbers = jnp.zeros((16, 32), jnp.int32)
    make = lambda: (  # noqa: E731
        paged(numbers, 512, 8, 128, dtype) if table else contiguous(16, 4096, 8, 128, dtype)
    )
    cache = jax.eval_shape(make)

    def place(x, *axes):
        if x is None:
            return None
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes))
        )

    rows = None if table else "data"
    pages = {n: place(getattr(cache, n), rows, None, "tensor") for n in ("k_PTM", "v_PTM")}
    scales = {n: place(getattr(cache, n), rows, "tensor") for n in ("k_scale_PGT", "v_scale_PGT")}
    cache = dataclasses.replace(cache, **pages, **scales)
    q = place(jax.ShapeDtypeStruct((16, 1, 32, 128), jnp.bfloat16), rows, None, "tensor")
    run = lambda q, cache, slopes: decode(q, cache, score_mod=LinearBias(slopes))  # noqa: E731
    slopes = jax.ShapeDtypeStruct((32,), jnp.float32)
    program = aot.compile(run, q, cache, slopes, topology=mesh)
    text = program.compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert "all-gather" not in text and "all-to-all" not in text
    held = 2 * 16 * 4096 * 8 * 128 * jnp.dtype(dtype).itemsize // 4
    assert held < program.arguments < 1.1 * held
    assert program.temporaries < held / 8
    assert program.work.kernels == 4 * 16 * 32 * 4096 * 128  # of all devices together
