"""Looking at attention: a function of each layer's parts, in one pass of the model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.models import decoder
from lcm.models.spec import ModelSpec
from lcm.nn.spec import LATENT
from lcm.ops.attention import Part
from lcm.positions import PositionEncoding
from lcm.types import Context, Tokens

Measure = Callable[[tuple[Part, ...], Context], Any]


def probe(
    spec: ModelSpec, params: decoder.Params, tokens_BL: Tokens, context: Context, measure: Measure
) -> Any:
    """`measure(parts, context)` of every layer of attention, stacked along a leading axis.

    Layers are written out, not scanned, so compilation grows with depth; what `measure` returns,
    such as sums of dense scores, decides the memory.

    Raises:
        ConfigError: if an encoding's attention is not that of its parts, or a layer has a mixer
            without parts of attention.
    """
    check_scores(spec)
    for layer in spec.layers:
        _check_parts(layer.positions)
    shared = decoder.prepared(spec, params.get("positions", {}))
    x_BLD = decoder.embedded(spec, params, tokens_BL, context, shared)
    found = []
    for _, _, run, encoding in decoder.in_turn(spec, params, shared):
        found.append(measure(run(x_BLD, context, encoding, method="parts"), context))
        x_BLD, _ = run(x_BLD, context, None, encoding)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def check_scores(spec: ModelSpec) -> None:
    """Refuses models with layers that have no scores of attention.

    Raises:
        ConfigError: naming the layer.
    """
    for n, layer in enumerate(spec.layers):
        if layer.mixer not in ("attention", LATENT):
            raise ConfigError(
                f"layer {n} is {layer.mixer}, which has no scores to look at: take a model of "
                "attention alone; of recurrences see lcm.evaluation.remembrance"
            )


def _check_parts(encoding: PositionEncoding) -> None:
    kind = type(encoding.attending)
    if kind.attend is not PositionEncoding.attend:
        raise ConfigError(
            f"{kind.__name__} reads scores or chooses keys as it attends, so there "
            "are no parts of attention to look at: take another encoding, or measure by the loss"
        )
