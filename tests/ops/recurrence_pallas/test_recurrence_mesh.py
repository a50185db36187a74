"""Recurrence kernels under a mesh: rows, heads and tokens of each device, and the same results."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcm import aot
from lcm.ops.recurrence import op_diag, op_matrix

PROGRAM = """
import itertools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType
from lcm.ops.recurrence import op_diag, op_matrix
from lcm.ops.recurrence.pallas import channels, erasing, plan

erasing.CHUNK, channels.CHUNK = 32, 16
random = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
reset = jnp.asarray(random.random((4, 64)) < 0.1)
a, b, h0 = draw(4, 64, 6, 2), draw(4, 64, 6, 2), draw(4, 6, 2)
q, v, decay = draw(4, 64, 1, 8) / 8, draw(4, 64, 4, 16), -jnp.abs(draw(4, 64, 4))
matrix = lambda q, k, v, l, S0, reset_BL: op_matrix(q, k, v, l, None, S0, reset_BL)
rule = lambda q, a, v, l, r, S0, reset_BL: op_matrix(q, a, v, l, (a, a, r), S0, reset_BL)
unit = draw(4, 64, 2, 8) / 4
cases = {
    "diagonal": (op_diag, (jax.nn.sigmoid(a), b, h0)),
    "one group": (matrix, (q, 2 * q, v, decay, draw(4, 4, 8, 16))),
    "two groups": (matrix, (q.repeat(2, 2), draw(4, 64, 2, 8) / 8, v, decay, draw(4, 4, 8, 16))),
    "by channel": (matrix, (q, unit, v[:, :, :2], -jnp.abs(unit), draw(4, 2, 8, 16))),
    "delta rule": (rule, (q, unit, v, decay, -jax.nn.sigmoid(decay), draw(4, 4, 8, 16))),
}

def both(run, given):
    def loss(given):
        found = run(*given, reset_BL=reset)
        return sum(jnp.sin(x).sum() for x in found), found
    return jax.jit(jax.value_and_grad(loss, has_aux=True))

meshes = itertools.cycle(((2, 1, 2, 2), (2, 2, 1, 2)))
for (name, (run, given)), sizes in zip(cases.items(), meshes):
    plan.interpret = False
    alone = both(run, given)(given)
    plan.interpret = True
    axes = "data", "fsdp", "context", "tensor"
    with jax.set_mesh(jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * 4)):
        step = both(run, given)
        assert "pallas_call" in str(jax.make_jaxpr(step)(given)), (name, sizes)
        meshed = step(given)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(meshed), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(a).max()), err_msg=name)
"""


def test_a_mesh_changes_nothing():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr[-3000:]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is missing: nothing is compiled for TPUs; pip install 'jax[tpu]'",
)
@pytest.mark.quick("axes0")
@pytest.mark.parametrize("axes", [("fsdp", "tensor"), ("data", "context")])
def test_a_mesh_of_tpus_has_the_kernels(axes):
    mesh = aot.mesh("v5e:2x2", (2, 2), axes)
    tokens = PartitionSpec(axes[0], "context" if "context" in axes else None)

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, tokens))

    def loss(a, b, q, v, l):
        y = op_matrix(q, q, v, l)[0] + op_matrix(q, q, v, l, (q, q, l))[0]
        y += op_matrix(q, q, v, v)[0]  # as many channels of keys as of values
        return op_diag(a, b)[0].sum() + y.astype(jnp.float32).sum()

    x, given = array(2, 512, 256), (array(2, 512, 1, 64), array(2, 512, 4, 64), array(2, 512, 4))
    program = aot.compile(jax.grad(loss, (0, 1, 2, 3, 4)), x, x, *given, topology=mesh)
    for name in (
        "diagonal_from_the_end",
        "matrix_backward",
        "erasing_backward",
        "channels_backward",
    ):
        assert any(name in kernel for kernel in program.kernels), program.kernels
    assert program.work.kernels >= 2 * 2 * x.size
