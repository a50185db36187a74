"""A decoder's layers as an encoder: of vectors as well as tokens, in an order for each layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lcm.errors import ConfigError
from lcm.models import decoder, default_context
from lcm.models.spec import ModelSpec
from lcm.nn.orders import grid_orders, reordered, reordered_context, restored
from lcm.nn.spec import LayerSpec
from lcm.types import Array, Context, Hidden, Tokens


def rows(tokens_BL: Tokens, count_B: Array, start: Array | int = 0) -> Context:
    """`default_context` of rows of which `count_B` tokens are there, padding behind them.

    Raises:
        ValueError: for tokens and counts that do not go together.
    """
    check_counts(tokens_BL, count_B)
    plain = default_context(tokens_BL.shape, start)
    there_BL = jnp.arange(tokens_BL.shape[1]) < count_B[:, None]
    return plain._replace(segments_BL=there_BL.astype(jnp.int32))


def check_counts(tokens_BL: Tokens, count_B: Array, least: int = 0) -> None:
    """Refuses rows without a token, and counts that are not one for each row, from `least` to the
    length: those that can be seen, as inside of a program they cannot.

    Raises:
        ValueError: naming shapes or the count.
    """
    rows, counts = jnp.shape(tokens_BL), jnp.shape(count_B)
    if len(rows) != 2 or 0 in rows or counts != rows[:1]:
        raise ValueError(
            f"tokens {rows} with counts {counts}: give [B, L] of one row and one token or more, "
            "and [B]"
        )
    if isinstance(count_B, jax.core.Tracer):
        return
    for row, count in enumerate(np.asarray(count_B)):
        if not least <= count <= rows[1]:
            raise ValueError(
                f"row {row} has {count} of {rows[1]} tokens: give a count from {least} to {rows[1]}"
            )


def encode_tokens(
    spec: ModelSpec,
    params: decoder.Params,
    tokens_BL: Tokens,
    context: Context,
    grid: tuple[int, ...] = (),
) -> Hidden:
    """`encode` of the embeddings of tokens."""
    shared = decoder.prepared(spec, params.get("positions", {}))
    x_BLD = decoder.embedded(spec, params, tokens_BL, context, shared)
    return encode(spec, params, x_BLD, context, grid)


def encode(
    spec: ModelSpec,
    params: decoder.Params,
    x_BLD: Hidden,
    context: Context,
    grid: tuple[int, ...] = (),
) -> Hidden:
    """The normalised output of the last layer, `[B, L, D]`, each token where it was.

    Layer n reads the grid in order n of its cycle (`lcm.nn.orders`): `(L,)` is text read in both
    directions by turns, `()` is text read forwards by all, which is the decoder itself.

    Raises:
        ConfigError: for a grid of other than L cells.
    """
    length = x_BLD.shape[1]
    plain = grid_orders((length,))[:1]
    orders = grid_orders(grid) if grid else plain
    if len(orders[0]) != length:
        raise ConfigError(
            f"grid {grid} has {len(orders[0])} cells for {length} tokens: give the axes of what "
            f"was flattened, or ({length},) for text"
        )
    shared = decoder.prepared(spec, params.get("positions", {}))
    for n in range(spec.depth):
        kind, at = n % len(spec.layers), n // len(spec.layers)
        order_L = orders[n % len(orders)]
        own = shared.get(decoder.own_encoding(spec, kind), {})
        read = reordered(x_BLD, order_L), reordered_context(context, order_L), own
        x_BLD = restored(layer(spec.layers[kind], params["layers"][str(kind)], at, *read), order_L)
    return decoder.final_norm(spec, params, x_BLD)


@functools.partial(jax.jit, static_argnums=0)
def layer(
    kind: LayerSpec,
    stacked: decoder.Params,
    at: Array | int,
    x_BLD: Hidden,
    context: Context,
    shared: decoder.Params,
) -> Hidden:
    """The layer `at` a place of those of its kind, traced once for all of them."""
    own = jax.tree.map(lambda leaf: leaf[at], stacked)
    return decoder.block(kind).apply(own, x_BLD, context, None, shared)[0]
