"""The decoder-only language model: `init` and `apply`, layers stacked and scanned."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lcm import nn
from lcm.models.spec import ModelSpec
from lcm.nn.experts import Load, Told
from lcm.nn.functional import Functional, functional
from lcm.nn.rwkv import Place
from lcm.nn.shared import ASIDE, BLOCK, EMBEDDING
from lcm.nn.shared import block as shared_block
from lcm.ops.placed import placed
from lcm.ops.platform import platform
from lcm.positions import PositionEncoding
from lcm.types import Array, Context, Hidden, Logits, Tokens

Params = dict[str, Any]
# Rounds written out where unroll is 0, on a CPU: compilation grows with them.
MOST_UNROLLED = 16
RESIDUAL = "residual"
HANDED = "handed on"
BLOCKS = "blocks"


class State(NamedTuple):
    """What sequences leave behind: `used_B` tokens of each so far, int32, and one entry per kind of
    layer, stacked over the layers of that kind, or a list of them."""

    used_B: Array
    layers: tuple[Any, ...]


@functools.cache
def block(layer: nn.LayerSpec) -> Functional:
    """The functions of one layer."""
    return functional(lambda rngs: nn.layer(layer, rngs))


@functools.cache
def _ends(spec: ModelSpec) -> tuple[Functional, Functional, Functional | None]:
    """Embedding, final norm and, where it is not the embedding table, head."""
    make_norm = functools.partial(nn.NORMS[spec.norm], spec.width, spec.norm_eps)

    def make_embedding(rngs: Any) -> nn.Embedding:
        inner = make_norm() if spec.embed_norm else None
        return nn.Embedding(spec.vocab, spec.width, rngs, scale=spec.embed_scale, norm=inner)

    embedding, norm = functional(make_embedding), functional(lambda rngs: make_norm())
    head = functional(lambda rngs: nn.Head(spec.width, spec.vocab, rngs))
    return embedding, norm, None if spec.tied else head


def init(spec: ModelSpec, key: jax.Array) -> Params:
    """Fresh float32 parameters; those of layers of one kind are stacked along a leading axis."""
    keys = iter(jax.random.split(key, 4 + len(spec.layers)))
    embedding, norm, head = _ends(spec)
    params = {"embedding": embedding.init(next(keys)), "final_norm": norm.init(next(keys))}
    if head is not None:
        params["head"] = head.init(next(keys))
    positions = _init_positions(spec, next(keys))
    if positions:
        params["positions"] = positions
    params["layers"] = {
        str(i): _init_layers(spec, i, jax.random.split(next(keys), spec.count(i)))
        for i in range(len(spec.layers))
    }
    blocks = {str(layer.option("block")): layer for layer in spec.layers if layer.shares}
    if blocks:
        params[BLOCKS] = {
            name: shared_block(layer).init(jax.random.fold_in(key, int(name)))
            for name, layer in blocks.items()
        }
    return params


@functools.cache
def shapes(spec: ModelSpec) -> Params:
    """The parameters as shapes."""
    return jax.eval_shape(lambda key: init(spec, key), jax.random.key(0))


def _init_layers(spec: ModelSpec, kind: int, keys: jax.Array) -> Params:
    """Layers of a kind; of mixers whose initial values differ from layer to layer, each its own.

    Kinds with one mixer count its layers together, as they stand in the model.
    """
    layer = spec.layers[kind]
    params, mixer = jax.vmap(block(layer).init)(keys), nn.MIXERS[layer.mixer]
    if not hasattr(mixer, "initial"):
        return params
    alike = [n for n, each in enumerate(spec.in_order) if each.mixer == layer.mixer]
    numbers = [at for at, n in enumerate(alike) if n % len(spec.layers) == kind]
    at = jnp.array(numbers, jnp.float32)
    places = Place(at / max(len(alike) - 1, 1), at / len(alike))
    own = jax.vmap(lambda place: mixer.initial(layer, place))(places)
    return {**params, "mixer": {**params["mixer"], **own}}


def apply(
    spec: ModelSpec, params: Params, tokens_BL: Tokens, context: Context, state: State | None
) -> tuple[Logits, State | None]:
    """float32 logits `[B, L, V]` and, if a state was given, the state after these tokens."""
    x_BLD, state = hidden(spec, params, tokens_BL, context, state)
    return logits(spec, params, x_BLD), state


def hidden(
    spec: ModelSpec, params: Params, tokens_BL: Tokens, context: Context, state: State | None
) -> tuple[Hidden, State | None]:
    """The normalised output of the last layer, in the dtype the model computes in."""
    shared = prepared(spec, params.get("positions", {}))
    x_BLD = _residual(embedded(spec, params, tokens_BL, context, shared))
    states = tuple(None for _ in spec.layers) if state is None else state.layers
    handed = _handed_on(spec, params["layers"], x_BLD, context, states)
    shared = {**shared, HANDED: handed, EMBEDDING: x_BLD, BLOCKS: params.get(BLOCKS)}
    x_BLD, states = _layers(spec, params["layers"], x_BLD, context, states, shared)
    x_BLD = final_norm(spec, params, x_BLD)
    if state is None:
        return x_BLD, None
    there_B = (context.segments_BL > 0).sum(1, dtype=jnp.int32)
    return x_BLD, State(state.used_B + there_B, states)


def hidden_and_load(
    spec: ModelSpec, params: Params, tokens_BL: Tokens, context: Context, state: State | None
) -> tuple[Hidden, State | None, Load]:
    """`hidden` and the loads of all layers of experts, `[R, ...]`, by kind and then by layer."""
    layers = tuple(None for _ in spec.layers) if state is None else state.layers
    used_B = jnp.zeros(tokens_BL.shape[0], jnp.int32) if state is None else state.used_B
    telling = (
        Told(x) if y.mlp == "experts" else x for x, y in zip(layers, spec.layers, strict=True)
    )
    x_BLD, after = hidden(spec, params, tokens_BL, context, State(used_B, tuple(telling)))
    loads = [each.load for each in after.layers if isinstance(each, Told)]
    load_R = jax.tree.map(lambda *kinds: jnp.concatenate(kinds), *loads)
    if state is None:
        return x_BLD, None, load_R
    layers = (each.state if isinstance(each, Told) else each for each in after.layers)
    return x_BLD, after._replace(layers=tuple(layers)), load_R


def embedded(
    spec: ModelSpec, params: Params, tokens_BL: Tokens, context: Context, shared: Params
) -> Hidden:
    """What the first layer reads: token embeddings with what the encoding adds to them."""
    embedding, _, _ = _ends(spec)
    x_BLD = embedding.apply(params["embedding"], tokens_BL, spec.dtype)
    return spec.positions.embed(shared.get("model", {}), x_BLD, context)


def final_norm(spec: ModelSpec, params: Params, x_BLD: Hidden) -> Hidden:
    """The norm after the last layer."""
    _, norm, _ = _ends(spec)
    return norm.apply(params["final_norm"], x_BLD)


def logits(spec: ModelSpec, params: Params, x_BLD: Hidden) -> Logits:
    """float32 logits of the normalised output of the last layer, soft-capped if the model is."""
    return capped(spec, scores(spec, params, x_BLD))


def scores(spec: ModelSpec, params: Params, x_BLD: Hidden) -> Logits:
    """The product with the output matrix."""
    _, _, head = _ends(spec)
    if head is None:
        return nn.tied_logits(x_BLD, params["embedding"]["table"])
    return head.apply(params["head"], x_BLD)


def capped(spec: ModelSpec, scores_BLV: Logits) -> Logits:
    """The logits that the product becomes."""
    cap = spec.logit_cap
    scores_BLV = scores_BLV / spec.logit_divisor if spec.logit_divisor != 1 else scores_BLV
    return cap * jnp.tanh(scores_BLV / cap) if cap else scores_BLV


def init_state(
    spec: ModelSpec, batch: int, length: int, dtype: Any = None, chunk: int = 0
) -> State:
    """The empty state for `batch` rows of up to `length` tokens, keys and values in a dtype."""
    dtype = spec.dtype if dtype is None else dtype

    def stacked(kind: int, layer: nn.LayerSpec) -> Any:
        one = nn.init_state(layer, batch, length, dtype, chunk)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (spec.count(kind), *x.shape)), one)

    layers = tuple(stacked(i, layer) for i, layer in enumerate(spec.layers))
    return State(jnp.zeros(batch, jnp.int32), layers)


def _handed_on(
    spec: ModelSpec, layers: Params, x_BLD: Hidden, context: Context, states: tuple
) -> dict[str, Array]:
    """What a first layer of RWKV-7 hands on to all: its values, which for that are made twice."""
    first = spec.layers[0]
    if not hasattr(nn.MIXERS[first.mixer], "first_values"):
        return {}
    of_first = lambda stacked: jax.tree.map(lambda leaf: leaf[0], stacked)  # noqa: E731
    own, state = (x[0] if isinstance(x, list) else of_first(x) for x in (layers["0"], states[0]))
    values = block(first).apply(own, x_BLD, context, state, method="first_values")
    return {"values": values}


def _own(spec: ModelSpec, shared: Params, kind: int, aside: Params) -> Params:
    """What a layer of a kind is given besides its own parameters."""
    layer = spec.layers[kind]
    own = {**shared.get(own_encoding(spec, kind), {}), **shared.get(HANDED, {}), **aside}
    if layer.shares:
        own[BLOCK], own[EMBEDDING] = shared[BLOCKS][str(layer.option("block"))], shared[EMBEDDING]
    return own


def _passed_on(layer: nn.LayerSpec, x_BLD: Hidden, y_BLD: Hidden) -> tuple[Hidden, Params]:
    """The stream behind a layer, from what it read and what it gave, and what the next one reads
    beside it."""
    y_BLD = _residual(y_BLD)
    return (x_BLD, {ASIDE: y_BLD}) if layer.shares else (y_BLD, {})


def unstacked(stacked: Any) -> list[Any]:
    """The layers of a kind, or their states, one by one instead of along a leading axis.

    A loop over stacked layers copies each layer's weights and, at each step, all of its state; with
    arrays of their own they are read, and a donated state is written, where they lie.
    """
    count = jax.tree.leaves(stacked)[0].shape[0]
    return [jax.tree.map(lambda x, n=n: x[n], stacked) for n in range(count)]


def over_layers(change: Callable[..., Any], *layers: tuple[list, ...]) -> tuple[list, ...]:
    """`change` of each layer's state, of states whose layers are lists."""
    kinds = zip(*layers, strict=True)
    return tuple([change(*each) for each in zip(*kind, strict=True)] for kind in kinds)


def _layers(
    spec: ModelSpec, params: Params, x_BLD: Hidden, context: Context, states: tuple, shared: Params
) -> tuple[Hidden, tuple]:
    """All layers: a scan over the full rounds of the pattern, then the rest one by one.

    Layers that are lists (see `unstacked`) are written out, and so are their states.
    """
    kinds = range(len(spec.layers))
    if isinstance(params["0"], list):
        return _written_out(spec, params, x_BLD, context, states, shared)

    def round_(x_BLD: Hidden, inputs: tuple, kinds: range = kinds) -> tuple[Hidden, tuple]:
        layers, states = inputs
        after, aside = [], {}
        for i in kinds:
            run = _remat(spec, block(spec.layers[i]).apply)
            own = _own(spec, shared, i, aside)
            y_BLD, state = run(layers[i], x_BLD, context, states[i], own)
            x_BLD, aside = _passed_on(spec.layers[i], x_BLD, y_BLD)
            after.append(state)
        return x_BLD, tuple(after)

    stacked = tuple(params[str(i)] for i in kinds), states
    full = jax.tree.map(lambda leaf: leaf[: spec.rounds], stacked)
    x_BLD, after = jax.lax.scan(round_, x_BLD, full, unroll=_unroll(spec))
    if spec.rest:
        last = jax.tree.map(lambda leaf: leaf[-1], stacked)
        x_BLD, extra = round_(x_BLD, last, range(spec.rest))
        extra += tuple(None for _ in range(spec.rest, len(kinds)))
        after = tuple(_extended(full, one) for full, one in zip(after, extra, strict=True))
    return x_BLD, after


def _residual(x_BLD: Hidden) -> Hidden:
    """The residual stream, by rows and tokens: what all layers read and write, in one layout."""
    return placed(x_BLD, "rows", "tokens", "width")


def _written_out(
    spec: ModelSpec, params: Params, x_BLD: Hidden, context: Context, states: tuple, shared: Params
) -> tuple[Hidden, tuple]:
    after: tuple[list, ...] = tuple([] for _ in spec.layers)
    aside: Params = {}
    for n in range(spec.depth):
        kind, at = n % len(spec.layers), n // len(spec.layers)
        own = _own(spec, shared, kind, aside)
        state = None if states[kind] is None else states[kind][at]
        arguments = params[str(kind)][at], x_BLD, context, state, own
        y_BLD, state = _layer(spec.layers[kind], *arguments)
        x_BLD, aside = _passed_on(spec.layers[kind], x_BLD, y_BLD)
        after[kind].append(state)
    return x_BLD, after


@functools.partial(jax.jit, static_argnums=0)
def _layer(layer: nn.LayerSpec, *arguments: Any) -> tuple[Hidden, Any]:
    """One layer, traced once for all that are alike."""
    return block(layer).apply(*arguments)


def _unroll(spec: ModelSpec) -> int:
    """Rounds per step of the scan; a loop costs a CPU a copy of all that is kept for gradients."""
    if spec.unroll:
        return min(spec.unroll, spec.rounds)
    return min(spec.rounds, MOST_UNROLLED) if platform() == "cpu" else 1


def _extended(stacked: Any, one: Any) -> Any:
    """A stack of states with one more at its end."""
    if one is None:
        return stacked
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), stacked, one)


def _remat(spec: ModelSpec, block: Any) -> Any:
    """What the backward pass keeps of a layer: all, the matmuls with weights, or its input.

    That may wait in the host's memory (`offload`), from where it comes back when its turn does.
    """
    if spec.remat == "none":
        return block
    policies = jax.checkpoint_policies
    if spec.remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[RESIDUAL],
            offload_src="device",
            offload_dst="pinned_host",
        )

        def named(params: Params, x_BLD: Hidden, *rest: Any) -> tuple[Hidden, Any]:
            return block(params, checkpoint_name(x_BLD, RESIDUAL), *rest)

        return jax.checkpoint(named, policy=policy)
    keep = {"dots": policies.dots_with_no_batch_dims_saveable, "full": policies.nothing_saveable}
    return jax.checkpoint(block, policy=keep[spec.remat])


def own_encoding(spec: ModelSpec, kind: int) -> str:
    """Where the shared parameters of a kind's encoding lie: with the model's if it is the same."""
    return "model" if spec.layers[kind].positions == spec.positions else str(kind)


def prepared(spec: ModelSpec, shared: Params) -> Params:
    """Shared parameters of encodings with what they derive from them, once for all layers."""
    encodings = _encodings(spec)
    return {name: encodings[name].prepare(own) for name, own in shared.items() if name in encodings}


def in_turn(
    spec: ModelSpec, params: Params, shared: Params
) -> Iterator[tuple[int, nn.LayerSpec, Callable[..., Any], Params]]:
    """Each layer's place in the model, what it is, its block with its own parameters, and what
    `prepared` has of its encoding: for what is looked at or done between layers."""
    for n in range(spec.depth):
        kind, at = n % len(spec.layers), n // len(spec.layers)
        own = jax.tree.map(lambda leaf, at=at: leaf[at], params["layers"][str(kind)])
        run = functools.partial(block(spec.layers[kind]).apply, own)
        yield n, spec.layers[kind], run, shared.get(own_encoding(spec, kind), {})


def adopt(spec: ModelSpec, params: Params, key: jax.Array) -> Params:
    """Parameters of a trained model under the encodings of `spec`: fresh where they are new, as
    are clocks."""
    encodings = _encodings(spec)
    trained, adopted = params.get("positions", {}), {**params}
    for name, fresh in _init_positions(spec, key).items():
        own = encodings[name].adopt(fresh, trained.get(name, {}))
        adopted["positions"] = {**adopted.get("positions", {}), name: own}
    adopted["layers"] = {
        str(i): _adopted_layer(spec, i, params["layers"][str(i)], jax.random.fold_in(key, i))
        for i in range(len(spec.layers))
    }
    return adopted


def _adopted_layer(spec: ModelSpec, kind: int, params: Params, key: jax.Array) -> Params:
    layer, mixer = spec.layers[kind], params["mixer"]
    if dict(layer.options).get("clocked") and "clock" not in mixer:
        clock = shapes(spec)["layers"][str(kind)]["mixer"]["clock"]
        params = {**params, "mixer": {**mixer, "clock": jnp.ones(clock.shape, clock.dtype)}}
        mixer = params["mixer"]
    keys = jax.random.split(key, spec.count(kind))
    fresh = jax.vmap(lambda key: layer.positions.init_layer(key, layer.dims))(keys)
    if not fresh:
        return params
    own = jax.vmap(layer.positions.adopt)(fresh, mixer.get("positions", {}))
    return {**params, "mixer": {**mixer, "positions": own}}


def project(spec: ModelSpec, params: Params) -> Params:
    """Parameters of encodings within the limits they set, such as KERPLE's."""
    if "positions" in params:
        own = _encodings(spec)
        projected = {name: own[name].project(each) for name, each in params["positions"].items()}
        params = {**params, "positions": projected}
    layers = dict(params["layers"])
    for i, layer in enumerate(spec.layers):
        mixer = layers[str(i)]["mixer"]
        if "positions" in mixer:
            mixer = {**mixer, "positions": layer.positions.project(mixer["positions"])}
            layers[str(i)] = {**layers[str(i)], "mixer": mixer}
    return {**params, "layers": layers}


def _encodings(spec: ModelSpec) -> dict[str, PositionEncoding]:
    """Encodings by where their shared parameters lie."""
    own = {own_encoding(spec, i): layer.positions for i, layer in enumerate(spec.layers)}
    return {**own, "model": spec.positions}


def _init_positions(spec: ModelSpec, key: jax.Array) -> Params:
    """Parameters that layers share, for the model's encoding and each kind's that differs."""
    made = {"model": spec.positions.init(key, spec.placed.dims)}
    for i, layer in enumerate(spec.layers):
        if own_encoding(spec, i) != "model":
            made[str(i)] = layer.positions.init(jax.random.fold_in(key, i), layer.dims)
    return {name: params for name, params in made.items() if params}
