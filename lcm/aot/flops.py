"""The arithmetic of a program, counted in its jaxpr: loops as often as they run.

XLA's own count takes the body of a loop once, whatever its trips, and so one layer of a stack that
is scanned. Here a `scan` counts as often as it is long, a kernel as its `cost_estimate` says.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core


class Work(NamedTuple):
    """FLOPs of a program on all devices together, a multiplication and an addition being two.

    matmul: of `dot_general` and convolutions outside kernels.
    kernels: of Pallas kernels, by the estimates they state.
    unknown: what is missing: kernels that state none, by name, and "while" for each loop whose
        trips only its run tells, and which was counted as one.
    """

    matmul: float = 0.0
    kernels: float = 0.0
    unknown: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        return self.matmul + self.kernels

    def times(self, count: int) -> "Work":
        return Work(count * self.matmul, count * self.kernels, self.unknown)


def work(fn: Callable, *args: Any) -> Work:
    """The work of `fn(*args)`, for arrays or `jax.ShapeDtypeStruct`s; nothing is compiled."""
    return of(jax.make_jaxpr(fn)(*args).jaxpr)


def of(jaxpr: core.Jaxpr, only: Any = None) -> Work:
    """The work of a jaxpr; of its products only those of operands of one dtype, if one is given."""
    return _sum(_equation(eqn, only) for eqn in jaxpr.eqns)


def _sum(works: Iterable[Work]) -> Work:
    works = tuple(works)
    unknown = tuple(name for work in works for name in work.unknown)
    return Work(sum(w.matmul for w in works), sum(w.kernels for w in works), unknown)


def _equation(eqn: core.JaxprEqn, only: Any = None) -> Work:
    name, params = eqn.primitive.name, eqn.params
    if name in ("dot_general", "conv_general_dilated"):
        if only is not None and any(x.aval.dtype != only for x in eqn.invars[:2]):
            return Work()
        return Work(matmul=_dot(eqn) if name == "dot_general" else _convolution(eqn))
    if name == "pallas_call":
        estimate = params["cost_estimate"]
        if estimate is None:
            return Work(unknown=(str(params["name"]),))
        return Work(kernels=float(estimate.flops))
    inner = [of(sub, only) for sub in inside(params)]
    if name == "cond":
        return max(inner, key=lambda branch: branch.flops)
    if name == "scan":
        return _sum(inner).times(params["length"])
    if name == "shard_map":  # the body is that of one device
        axes = params["newly_manual_axes"]
        return _sum(inner).times(math.prod(params["mesh"].shape[axis] for axis in axes))
    return _sum([*inner, Work(unknown=("while",) * (name == "while"))])


def inside(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _dot(eqn: core.JaxprEqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolution(eqn: core.JaxprEqn) -> float:
    kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
    per_output = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * per_output
