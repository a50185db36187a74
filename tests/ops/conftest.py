"""Kernels compiled for TPUs that are not here: what the tests of their compilation share."""

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from lcm import aot

TOPOLOGIES = "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"


@pytest.fixture(params=TOPOLOGIES)
def topology(request) -> str:
    return request.param


@pytest.fixture
def compiles() -> Callable[[Callable[..., dict[str, Any]], Iterable[tuple]], None]:
    """`check(wanted, cases)`: compiles what is wanted of every case, then names all at fault.

    `wanted(*case)` gives the arguments of `_fault`.
    """
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'jax[tpu]' to compile for TPUs here")

    def check(wanted: Callable[..., dict[str, Any]], cases: Iterable[tuple]) -> None:
        faults = [f"{case}: {fault}" for case in cases if (fault := _fault(**wanted(*case)))]
        assert not faults, "\n".join(faults)

    return check


def _fault(
    topology: str, fn: Callable, args: tuple, kernels: int, flops: float, temporary: float
) -> str | None:
    """What is wrong with a program for one device.

    It must compile (errors of vector memory, layout or an operation that is missing are as on a
    chip) to so many kernels and no others, tell XLA of so many FLOPs at least, and have fewer
    temporary bytes.
    """
    try:
        program = aot.compile(fn, *args, topology=topology)
    except Exception as error:  # also of the lowering before the compiler, of several kinds
        return f"{type(error).__name__}: {str(error)[:2000]}"
    if len(program.kernels) != kernels:
        return f"kernels are {program.kernels}, not {kernels}"
    told = program.compiled.cost_analysis()["flops"]
    if told < flops:
        return f"XLA is told of {told:.4g} FLOPs, there are {flops:.4g} at least"
    if program.temporaries >= temporary:
        return f"temporaries of {program.temporaries} bytes are not below {temporary:.0f}"
    return None
