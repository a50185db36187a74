"""Kernels under a mesh: each device has its rows and heads, and the whole is as on one device."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from lcm import aot
from lcm.ops.attention import Part, attend, causal

PROGRAM = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType
from lcm.ops.attention import BlockMap, LinearBias, Part, causal, pallas, sharded, window
from lcm.ops.attention.pallas import plan
from lcm.types import Context

plan.interpret, plan.LARGEST = True, (128, 128)
kv_heads, batch = map(int, sys.argv[1:3])
rng = np.random.default_rng(0)
make = lambda n: jnp.asarray(rng.normal(size=(batch, 140, n, 16)), jnp.float32)
q, k, v, slopes = make(4), make(kv_heads), make(kv_heads), jnp.array([0.5, 0.25, 0.1, 0.0])
positions = np.stack([np.r_[np.arange(90), np.arange(50)]] * batch).astype(np.int32)
segments = np.stack([np.repeat([1, 2], [90, 50])] * batch).astype(np.int32)
where = Context(positions, segments, positions)

maps = None, None
if sys.argv[3:]:
    listed = rng.integers(0, 5, (4, 5, 3)).astype(np.int32)
    maps = BlockMap(32, listed), BlockMap(32, jnp.asarray(listed[:1]))

def run(q, k, v, slopes):
    near = Part(q, k, causal() & window(40), LinearBias(slopes), maps[0])
    far = Part(q, k, causal() & ~window(40), blocks=maps[1])
    return sharded.over_mesh(pallas.attend)((near, far), v, where, where, 0.25)

def loss(*args):
    out, lse = run(*args)
    return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum() + lse.sum()

both = jax.jit(lambda *a: (run(*a), jax.grad(loss, (0, 1, 2, 3))(*a)))
alone = both(q, k, v, slopes)
axes = "data", "fsdp", "context", "tensor"
mesh = jax.make_mesh((2, 1, 2, 2), axes, axis_types=(AxisType.Auto,) * 4)
with jax.set_mesh(mesh):
    meshed = both(q, k, v, slopes)
for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(meshed), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(a).max()))
print(meshed[0].out_BLHK.sharding.shard_shape(q.shape))
"""


@pytest.mark.quick("one key head*")
@pytest.mark.parametrize(
    ("kv_heads", "batch", "shard", "maps"),
    [
        (2, 2, (1, 140, 2, 16), []),
        (1, 2, (1, 140, 2, 16), []),
        (4, 3, (3, 140, 2, 16), []),
        (2, 2, (1, 140, 2, 16), ["maps"]),
    ],
    ids=["rows and heads", "one key head for two devices", "rows that do not divide", "maps"],
)
def test_a_mesh_changes_nothing(kv_heads, batch, shard, maps):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", PROGRAM, str(kv_heads), str(batch), *maps]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr[-3000:]
    assert done.stdout.strip() == str(shard)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is missing: nothing is compiled for TPUs; pip install 'jax[tpu]'",
)
def test_auto_is_the_kernel_where_the_program_is_for_a_tpu():
    mesh = aot.mesh("v5e:2x2", (2, 2), ("data", "tensor"))
    q = jax.ShapeDtypeStruct((2, 512, 4, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 512, 2, 128), jnp.bfloat16)
    loss = lambda q, k, v: attend([Part(q, k, causal())], v).astype(jnp.float32).sum()  # noqa: E731
    program = aot.compile(jax.grad(loss, (0, 1, 2)), q, k, k, topology=mesh)
    text = program.compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    # 2 matmuls forward and 7 backward over one tile of 512, on four devices a quarter each
    assert program.work.kernels == 9 * 2 * 2 * 4 * 512**2 * 128
