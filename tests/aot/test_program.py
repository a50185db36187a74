"""Programs compiled for TPUs that are not here."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import mesh_utils
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcm import aot
from lcm.aot import topology
from lcm.errors import CompileError

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is missing: nothing is compiled for TPUs; pip install 'jax[tpu]'",
)
SQUARE = jax.ShapeDtypeStruct((256, 256), jnp.float32)


def _double(x_ref, y_ref):
    y_ref[...] = 2 * x_ref[...]


def build(repeats):
    """A program with one kernel, for the process that reads its schedule."""
    call = pl.pallas_call(_double, SQUARE, name="double")
    return (lambda x: jax.lax.fori_loop(0, repeats, lambda _, x: call(x), x)), (SQUARE,)


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_bytes_of_one_device(topology):
    program = aot.compile(lambda x: x @ x, SQUARE, topology=topology, donate_argnums=0)
    assert (program.arguments, program.outputs, program.shared) == (2**18, 2**18, 2**18)
    assert program.memory == 2**18 + program.temporaries
    assert program.work.flops == 2 * 256**3 and program.devices == 1
    assert "HloModule" in program.compiled.as_text()


@needs_libtpu
def test_arguments_are_sharded_as_they_say():
    mesh = aot.mesh("v5e:2x2", (4,), ("x",))
    rows = jax.ShapeDtypeStruct(
        SQUARE.shape, SQUARE.dtype, sharding=NamedSharding(mesh, PartitionSpec("x"))
    )
    program = aot.compile(lambda a, b: a @ b, rows, SQUARE, topology=mesh)
    assert program.devices == 4
    assert program.arguments == 2**18 // 4 + 2**18
    assert program.work.flops == 2 * 256**3


@needs_libtpu
@pytest.mark.slow
def test_memory_is_what_the_compiler_asks_for():
    """It takes a program that by `temp_size_in_bytes` does not fit into the 15.75 GiB of a v5e."""
    mesh = aot.mesh("v5e:2x2", (4,), ("x",))
    array = jax.ShapeDtypeStruct(
        (8192, 8192), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x"))
    )

    def total(w, x):
        def body(x, _):
            x = jnp.tanh(x @ w)
            return x, x

        return jax.lax.scan(body, x, length=95)[1].sum()

    def step(w, x):
        return w - jax.grad(total)(w, x)

    program = aot.compile(step, array, array, topology=mesh, donate_argnums=0)
    told = program.compiled.memory_analysis()
    assert told.argument_size_in_bytes + told.temp_size_in_bytes > 15.75 * 2**30
    assert 15 * 2**30 < program.memory < 15.75 * 2**30


@needs_libtpu
def test_kernels_of_a_program():
    call = pl.pallas_call(_double, SQUARE, name="double")
    one, two = aot.compile(lambda x: call(jnp.sin(call(x))), SQUARE).kernels
    assert one.startswith("double") and two.startswith("double")
    assert aot.compile(jnp.sin, SQUARE).kernels == ()


@needs_libtpu
def test_the_schedule_of_a_kernel():
    (name, found), *others = aot.schedules(build, 3).items()
    assert name.startswith("double") and not others
    # 256 x 256 numbers are 64 registers of 1024: at least a load, a product and a store for each
    assert found.loads >= 64 and found.stores >= 64 and found.valu >= 64
    assert found.bundles >= 64 and found.mxu == found.fills == found.spills == 0


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:3x5", "v5e:0x1", "v5e:2", "h100", "v5e"])
def test_unknown_topologies(name):
    with pytest.raises(CompileError, match="take one such as v4:2x2x1"):
        aot.mesh(name)


@pytest.mark.parametrize(
    ("name", "rings"),
    [
        ("v5p:4x4x4", (True, True, True)),
        ("v4:4x8x12", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),
        ("v5e:16x16", (True, True, False)),
        ("v6e:8x16", (False, True, False)),
        ("v5e:4x4", (False, False, False)),
    ],
)
def test_axes_that_are_rings(name, rings):
    assert topology.wrapped(name) == rings


@needs_libtpu
def test_a_gather_over_rings_is_a_gather():
    """On a line of chips libtpu makes an all-reduce of it."""
    ring = mesh_utils.create_device_mesh((64,), topology.devices("v5p:4x4x4"))
    mesh = Mesh(ring, ("x",))
    cut = NamedSharding(mesh, PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=cut)
    whole = NamedSharding(mesh, PartitionSpec())
    text = aot.compile(lambda x: 2 * x, x, topology=mesh, out_shardings=whole).compiled.as_text()
    assert " all-gather" in text and " all-reduce(" not in text


@needs_libtpu
def test_meshes_larger_than_the_slice():
    with pytest.raises(CompileError, match="needs 8 devices, topology v5e:2x2 has 4"):
        aot.mesh("v5e:2x2", (2, 4), ("a", "b"))


@needs_libtpu
def test_a_program_that_does_not_fit():
    whole = pltpu.CompilerParams(vmem_limit_bytes=2**18)
    call = pl.pallas_call(_double, SQUARE, compiler_params=whole)
    with pytest.raises(CompileError, match="the TPU compiler refuses"):
        aot.compile(call, SQUARE)


def test_builders_that_another_process_cannot_find():
    def inner():
        return jnp.sin, (SQUARE,)

    with pytest.raises(CompileError, match="not at the top of a file"):
        aot.schedules(inner)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompileError, match=r"needs libtpu.*pip install"):
        aot.mesh("v5e:2x2")
