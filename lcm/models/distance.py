"""How far back recurrent heads read, and clocks slowed in those alone that read from afar.

The output of a Mamba layer is that of an attention M[i, j] which its steps and decays make (hidden
attention, Ali et al., 2024, arXiv:2403.01590). A head's mean distance, that of DeciMamba (2024,
arXiv:2406.14528, section 3), is

    MMD = sum_j (L - j) |M[L, j]| / sum_j |M[L, j]|        j = 1 ... L

Slowing the clock by n, as positions are interpolated, is best done to the fifth of the heads that
read furthest (UPI, ICLR 2026): the others have nothing beyond their trained length to reach. What a
clock is multiplied by is a parameter, so that it may also be learned by itself
(`train.only=clock`), as in MambaExtend.
"""

import jax.numpy as jnp
import numpy as np

from lcm.errors import ConfigError
from lcm.models import decoder, default_context
from lcm.models.spec import ModelSpec
from lcm.nn import MIXERS, LayerSpec
from lcm.nn.interventions import Extension
from lcm.types import Array, Tokens


def mean_distances(
    spec: ModelSpec, params: decoder.Params, tokens_BL: Tokens
) -> dict[int, np.ndarray]:
    """Mean distances in tokens, over rows, of the heads (Mamba: channels) of each layer that has a
    hidden attention, by its place in the model from 0. Rows are whole, of one document each.

    Raises:
        ConfigError: for a model without such a layer, or with an extension of one, which hidden
            attention does not follow.
    """
    _check(spec)
    context = default_context(tokens_BL.shape)
    shared = decoder.prepared(spec, params.get("positions", {}))
    x_BLD = decoder.embedded(spec, params, tokens_BL, context, shared)
    found = {}
    for n, layer, run, encoding in decoder.in_turn(spec, params, shared):
        if _reads(layer):
            weights_BLH = run(x_BLD, context, method="hidden_attention")
            found[n] = np.asarray(mean_distance(weights_BLH).mean(0))
        x_BLD, _ = run(x_BLD, context, None, encoding)
    return found


def mean_distance(weights_BLH: Array) -> Array:
    """MMD of the weights of the last token, `[B, H]`; nan where all are 0."""
    length = weights_BLH.shape[1]
    back_L = jnp.arange(length - 1, -1, -1, dtype=jnp.float32)
    weights_BLH = jnp.abs(weights_BLH)
    return jnp.einsum("l,blh->bh", back_L, weights_BLH) / weights_BLH.sum(1)


def slowed(
    spec: ModelSpec,
    params: decoder.Params,
    distances: dict[int, np.ndarray],
    step: float,
    share: float,
) -> decoder.Params:
    """Parameters whose clocks run at `step` times their speed in the heads that read furthest, a
    `share` of each layer's, one at least.

    params: of a model with `model.options=clocked=True`, as `lcm.models.adopt` makes them of those
        of a model without.

    Raises:
        ConfigError: for layers without a clock, or a step or a share that is none.
    """
    if not 0 < step < np.inf or not 0 < share <= 1:
        raise ConfigError(
            f"step={step}, share={share}: give a step such as 0.25, and a share of more than 0, up "
            "to 1"
        )
    layers = {kind: dict(own) for kind, own in params["layers"].items()}
    for n, distance_H in distances.items():
        kind, at = n % len(spec.layers), n // len(spec.layers)
        if not dict(spec.layers[kind].options).get("clocked"):
            raise ConfigError(
                f"layer {n} is {spec.layers[kind].mixer} without a clock: say "
                "model.options=clocked=True, and take parameters that lcm.models.adopt has made"
            )
        furthest = np.argsort(-distance_H)[: max(1, round(share * len(distance_H)))]
        mixer = dict(layers[str(kind)]["mixer"])
        mixer["clock"] = jnp.asarray(mixer["clock"]).at[at, furthest].multiply(step)
        layers[str(kind)]["mixer"] = mixer
    return {**params, "layers": layers}


def _reads(layer: LayerSpec) -> bool:
    return hasattr(MIXERS[layer.mixer], "hidden_attention")


def _check(spec: ModelSpec) -> None:
    reading = [layer for layer in spec.layers if _reads(layer)]
    if any(layer.extension != Extension() for layer in reading):
        raise ConfigError(
            "distances are those of layers as they were trained: leave model.extension out"
        )
    if not reading:
        can = [name for name, each in MIXERS.items() if hasattr(each, "hidden_attention")]
        names = ", ".join(sorted({layer.mixer for layer in spec.layers}))
        raise ConfigError(
            f"layers of {names} have no hidden attention whose distance could be told: take a "
            f"model with one of {', '.join(can)}"
        )
