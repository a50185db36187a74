"""The Pallas kernels of a step: how often each runs on a device, and its schedule by itself.

A kernel is taken out of the program's jaxpr with the shapes that one device has, so its schedule
needs no second compilation of the whole program, which may take minutes.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

from lcm.aot import flops
from lcm.aot.schedule import Schedule, schedules


class Kernel(NamedTuple):
    """Kernels of one name, code and shapes in a program.

    runs: on one device in one run of the program: loops as often as they run, branches all.
    flops: of one run, as the kernel states them.
    schedule: None where it was not asked for.
    """

    name: str
    runs: int
    flops: float
    schedule: Schedule | None = None

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        schedule = self.schedule and self.schedule._asdict()
        return self._asdict() | {"schedule": schedule}


def kernels(jaxpr: core.Jaxpr) -> tuple[Kernel, ...]:
    """Those of a program, in the order in which it names them."""
    return tuple(_kernel(call, runs) for call, runs in _distinct(jaxpr))


def scheduled(cfg: Any, step: str, topology: str) -> tuple[Kernel, ...]:
    """The same of a step of a config with their schedules, which another process compiles.

    Raises:
        CompileError: where a kernel does not compile.
    """
    of_step = _calls(cfg, step, topology)
    if not of_step:
        return ()
    found = {
        int(re.search(r"__(\d+)", name)[1]): schedule
        for name, schedule in schedules(build, cfg, step, topology, topology=topology).items()
    }
    return tuple(
        _kernel(call, runs)._replace(schedule=found.get(i))
        for i, (call, runs) in enumerate(of_step)
    )


def build(cfg: Any, step: str, topology: str) -> tuple[Callable, tuple]:
    """A program of the kernels of a step alone, each under its name and number."""
    calls = [call for call, _ in _calls(cfg, step, topology)]

    def fn(*given: tuple) -> list:
        results = []
        for i, (call, args) in enumerate(zip(calls, given, strict=True)):
            with jax.named_scope(f"{call.params['name']}__{i}"):
                results.append(call.primitive.bind(*args, **call.params))
        return results

    shapes = [[jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in c.invars] for c in calls]
    return fn, tuple(shapes)


def _calls(cfg: Any, step: str, topology: str) -> list[tuple[core.JaxprEqn, int]]:
    from lcm.aot import gate  # which asks for kernels itself
    from lcm.aot.steps import STEPS

    mesh = gate.mesh_of(cfg, topology)
    built = STEPS[step](cfg, mesh)
    with jax.set_mesh(mesh):
        return _distinct(jax.make_jaxpr(built.fn)(*built.args).jaxpr)


def _kernel(call: core.JaxprEqn, runs: int) -> Kernel:
    estimate = call.params["cost_estimate"]
    return Kernel(str(call.params["name"]), runs, float(estimate.flops) if estimate else 0.0)


def _distinct(jaxpr: core.Jaxpr) -> list[tuple[core.JaxprEqn, int]]:
    """Calls of kernels that differ in code or shapes, with the sum of their runs."""
    found: dict[tuple, tuple[core.JaxprEqn, int]] = {}
    for call, runs in _walk(jaxpr, 1):
        params = call.params
        shapes = tuple(str(x.aval) for x in call.invars)
        key = params["name"], str(params["jaxpr"]), str(params["grid_mapping"]), shapes
        first, before = found.get(key, (call, 0))
        found[key] = first, before + runs
    return list(found.values())


def _walk(jaxpr: core.Jaxpr, runs: int) -> Iterator[tuple[core.JaxprEqn, int]]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn, runs
            continue
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for sub in flops.inside(eqn.params):
            yield from _walk(sub, runs * times)
