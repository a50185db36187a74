"""The order of tokens over the mesh axis `context`, and what it does not go with."""

from typing import Any

import jax
import numpy as np

from lcm import models
from lcm.errors import ConfigError
from lcm.ops.placed import CONTEXT, shards
from lcm.positions import PositionEncoding
from lcm.types import Batch


def order(name: str, length: int, count: int) -> np.ndarray:
    """The token of the text at each place of a row whose shards lie on `count` devices, int `[L]`.

    plain     0, 1, 2, ...
    zigzag    chunks i and 2n - 1 - i of 2n on device i: under a causal mask each device has as many
              pairs of queries and keys (arXiv:2407.21783, section 3.3.2)
    striped   tokens i, i + n, i + 2n, ... on device i: as many in each step of a ring, too
              (arXiv:2311.09431)
    """
    tokens = np.arange(length)
    if name == "plain" or count == 1:
        return tokens
    if name == "striped":
        return tokens.reshape(-1, count).T.reshape(-1)
    chunks = tokens.reshape(2 * count, -1)
    pairs = [i for n in range(count) for i in (n, 2 * count - 1 - n)]
    return chunks[pairs].reshape(-1)


def arranged(batch: Batch, name: str) -> Batch:
    """A batch with its tokens in the order of a config, on the mesh in use.

    Within the step and not where the host reads rows, as placements take tokens in the order of
    the text, and as hosts have whole rows or parts of them. Everything that is known of a token
    goes with it, so nothing but what counts places needs to know.
    """
    count = shards()
    if name == "plain" or count == 1:
        return batch
    at = order(name, batch.tokens_BL.shape[1], count)
    return jax.tree.map(lambda x: x[:, at], batch)


def check(cfg: Any, sizes: dict[str, int]) -> None:
    """Raises a ConfigError for what cannot be computed, or would be wrong, over the axis."""
    name, count, length = cfg.mesh.order, sizes[CONTEXT], cfg.data.length
    if count == 1:
        return
    layers = models.spec(cfg).layers
    if name == "zigzag" and length % (2 * count):
        raise ConfigError(
            f"data.length={length} is not divisible by {2 * count}, the chunks of "
            f"mesh.order=zigzag over mesh.context={count}: take "
            f"{2 * count * -(-length // (2 * count))}, or mesh.order=striped"
        )
    for layer in layers:
        if name != "plain" and not layer.attends:
            raise ConfigError(
                f"mesh.order={name} changes the order of tokens, which the recurrence of "
                f"{layer.mixer} needs: set mesh.order=plain"
            )
        if name != "plain" and _reads_order(layer.positions):
            raise ConfigError(
                f"mesh.order={name} changes the order of tokens, which "
                f"{type(layer.positions.attending).__name__} counts: set mesh.order=plain"
            )
        if cfg.model.context_attention == "ulysses" and layer.attends:
            tensor = sizes["tensor"]
            for key, heads in (("heads", layer.heads), ("kv_heads", layer.kv_heads)):
                if heads % (tensor * count):
                    raise ConfigError(
                        f"model.context_attention=ulysses deals heads to mesh.context={count} "
                        f"times mesh.tensor={tensor} devices, {tensor * count}, which do not "
                        f"divide model.{key}={heads}: use ring or gather, or a smaller mesh.context"
                    )


def _reads_order(encoding: PositionEncoding) -> bool:
    """Whether its attention is one of its own, which goes by the places of keys."""
    return type(encoding.attending).attend is not PositionEncoding.attend
