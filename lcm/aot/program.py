"""A callable compiled ahead of time for a TPU topology: whether it fits, and what it computes."""

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lcm.aot import flops
from lcm.aot.flops import Work
from lcm.aot.topology import mesh as make_mesh
from lcm.errors import CompileError

_KERNEL = r'%([\w.\-]+) = [^\n]*custom_call_target="tpu_custom_call"'


class Program(NamedTuple):
    """What compilation tells. Bytes are those of one device, `work` that of all together.

    arguments, outputs, temporaries: bytes; `shared` of the outputs lie in donated arguments.
        Temporaries are those in use at once: `temp_size_in_bytes` has more of a program with loops
        (twice what a scan stacks, say), which the compiler's own check of the memory does not ask
        for. Gaps between buffers are left out. Where the peak has more, as of what a small program
        lays in vector memory, they are `temp_size_in_bytes`.
    host: bytes of temporaries in the memory of the host, for each device.
    work: FLOPs counted in the jaxpr, loops as often as they run.
    compiled: the executable, for `as_text()`, its HLO, and XLA's own `cost_analysis()`.
    seconds: compilation took.
    jaxpr: what was traced.
    """

    topology: str
    devices: int
    arguments: int
    outputs: int
    shared: int
    temporaries: int
    host: int
    work: Work
    compiled: jax.stages.Compiled
    seconds: float
    jaxpr: core.Jaxpr

    @property
    def memory(self) -> int:
        """Bytes of a device in use at once, the program itself left out."""
        return self.arguments + self.outputs - self.shared + self.temporaries

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the Pallas kernels in the program of one device, one for each call."""
        return tuple(re.findall(_KERNEL, self.compiled.as_text()))


def compile(fn: Callable, *args: Any, topology: str | Mesh = "v5e:2x2", **options: Any) -> Program:
    """Compiles `fn(*args)` for a TPU that need not be here.

    Args:
        fn: a function, or one that is jitted already.
        args: trees of arrays or `jax.ShapeDtypeStruct`s. Those without a sharding on the mesh are
            whole on each device.
        topology: a name for one device of that kind, or a mesh of `aot.mesh`.
        options: of `jax.jit`, such as `donate_argnums` and `out_shardings`.

    Raises:
        CompileError: for topologies that do not exist, and where the compiler refuses: a kernel
            that needs more VMEM than there is, a program larger than the memory.
    """
    mesh = make_mesh(topology) if isinstance(topology, str) else topology
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x: Any) -> jax.ShapeDtypeStruct:
        own = getattr(x, "sharding", None)
        here = isinstance(own, NamedSharding) and own.mesh == mesh
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own if here else everywhere)

    args = jax.tree.map(place, args)
    start = time.monotonic()
    try:
        with jax.set_mesh(mesh):  # what is traced can ask where it will run
            traced = jax.jit(fn, **options).trace(*args)
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        raise CompileError(f"the TPU compiler refuses {_name(fn)}: {error}") from error
    seconds = time.monotonic() - start
    used = compiled.memory_analysis()
    held = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    return Program(
        topology if isinstance(topology, str) else mesh.devices.flat[0].device_kind,
        mesh.size,
        used.argument_size_in_bytes,
        used.output_size_in_bytes,
        used.alias_size_in_bytes,
        min(used.temp_size_in_bytes, used.peak_memory_in_bytes - held),
        used.host_temp_size_in_bytes,
        flops.of(traced.jaxpr.jaxpr),
        compiled,
        seconds,
        traced.jaxpr.jaxpr,
    )


def _name(fn: Callable) -> str:
    return getattr(fn, "__qualname__", repr(fn))
