"""The bridge from NNX modules to functions: the one place that splits and merges."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

Params = dict[str, Any]


class Functional(NamedTuple):
    """`init(key) -> params`, a nested dict of arrays, and `apply(params, *args, method=...)`."""

    init: Callable[[jax.Array], Params]
    apply: Callable[..., Any]


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """The two functions of a module, as in `functional(lambda rngs: Block(spec, rngs))`."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))

    def apply(params: Params, *args: Any, method: str = "__call__") -> Any:
        return getattr(nnx.merge(graphdef, params), method)(*args)

    return Functional(init, apply)
