"""Models from a config: parameters, logits, state and cost.

Each function takes the config first; `spec` turns it into the hashable description under which
everything is compiled and cached.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.models import cost, decoder
from lcm.models import probe as probes
from lcm.models.decoder import State
from lcm.models.spec import ModelSpec, spec
from lcm.nn import MIXERS, RecurrentState
from lcm.nn.dense import Int8
from lcm.ops import attention
from lcm.ops.platform import platform
from lcm.types import Array, Context, Logits, Tokens

__all__ = [
    "ModelSpec",
    "State",
    "adopt",
    "apply",
    "check_backend",
    "check_limit",
    "check_params",
    "default_context",
    "flops_per_token",
    "init",
    "init_state",
    "only_used",
    "parameter_count",
    "probe",
    "spec",
    "state_bytes_per_token",
]

_init = jax.jit(decoder.init, static_argnums=0)
_probe = jax.jit(probes.probe, static_argnums=(0, 4))


@functools.partial(jax.jit, static_argnums=0)
def _apply(description: ModelSpec, params: decoder.Params, *given: Any) -> Any:
    _check_params(description, params)  # as it is traced, once for each shape
    return decoder.apply(description, params, *given)


def init(cfg: Any, key: jax.Array) -> decoder.Params:
    """Fresh parameters of the model in `cfg`: nested dicts of float32 arrays.

    Raises:
        ConfigError: if the model cannot be built.
    """
    return _init(spec(cfg), key)


def apply(
    cfg: Any,
    params: decoder.Params,
    tokens_BL: Tokens,
    context: Context | None = None,
    state: State | None = None,
) -> tuple[Logits, State | None]:
    """float32 logits `[B, L, V]` of the next token at each place, and the state after them.

    Without a context each row is one document that starts at position 0, or goes on where `state`
    ends. Without a state none is returned; begin one with `init_state`.

    Raises:
        ConfigError: if the model cannot be built, parameters are of another one, or its position
            table is too short.
        ValueError: if tokens, context and state differ in shape, are no integers where they are to
            be, or have no token; or if the state is of another config, or has no room left.
    """
    description = spec(cfg)
    _check_tokens(tokens_BL)
    if state is not None:
        _check_state(description, state, len(tokens_BL))
    used = 0 if state is None else state.used_B[:, None]
    if context is None:
        context = default_context(tokens_BL.shape, used)
    _check_context(context, tokens_BL.shape)
    _check_pace(description, context)
    _check_length(description, tokens_BL, state)
    return _apply(description, params, tokens_BL, context, state)


def adopt(cfg: Any, params: decoder.Params, key: jax.Array) -> decoder.Params:
    """Parameters of a trained model for `cfg`, which differs in encodings and clocks alone.

    What an encoding learns is kept where it has the same name and shape, fresh where it is new,
    and stretched where a learned table has become longer. Clocks of Mamba layers that had none run
    as they did. Other parameters are not touched.
    """
    return decoder.adopt(spec(cfg), params, key)


def default_context(shape: tuple[int, int], start: int | Array = 0) -> Context:
    """Rows of one document each, from position `start` on, their length not controlled.

    start: one number, or one for each row, `[B, 1]`.
    """
    positions = jnp.broadcast_to(start + jnp.arange(shape[1], dtype=jnp.int32), shape)
    return Context(positions, jnp.ones_like(positions), jnp.full_like(positions, -1))


def probe(
    cfg: Any,
    params: decoder.Params,
    tokens_BL: Tokens,
    measure: probes.Measure,
    context: Context | None = None,
) -> Any:
    """`measure(parts, context)` of each layer of attention, stacked; see lcm.models.probe.

    The parts are those of plain attention over the tokens themselves: masks, rotated queries and
    keys, score modifications. Compiled once for each `measure` and shape.

    Raises:
        ConfigError: if the model cannot be built, its position table is too short, or a layer has
            no parts of attention.
    """
    description = spec(cfg)
    check_limit(description, tokens_BL.shape[1])
    context = default_context(tokens_BL.shape) if context is None else context
    return _probe(description, params, tokens_BL, context, measure)


def init_state(cfg: Any, batch: int, length: int, *, dtype: Any = None, chunk: int = 0) -> State:
    """The empty state for `batch` rows of up to `length` tokens each.

    Args:
        cfg: the model.
        batch: rows.
        length: tokens of a row, all calls together.
        dtype: of keys and values; that of the model by default. "int8" has a scale per token and
            head.
        chunk: the most tokens of one call, with which layers that see a window alone, or a window
            and the first tokens, keep a ring of what can be seen; 0 keeps everything.

    Raises:
        ConfigError: if the model cannot be built, or has no place for so many tokens.
        ValueError: for a negative number.
    """
    if min(batch, length, chunk) < 0:
        raise ValueError(
            f"a state of {batch} rows of {length} tokens, {chunk} in a call: none may be negative"
        )
    description = spec(cfg)
    check_limit(description, length)
    return decoder.init_state(description, batch, length, dtype, chunk)


def check_limit(description: ModelSpec, length: int) -> None:
    """Refuses sequences that the position encoding has no place for.

    Raises:
        ConfigError: naming both lengths.
    """
    for layer in description.layers:
        limits = (e.limit(layer.dims) for e in (description.positions, layer.positions))
        for limit in limits:
            if limit is not None and length > limit:
                raise ConfigError(
                    f"length {length} does not fit the learned table of {limit} positions: "
                    f"train with --config.model.positions.length={length}, or choose an encoding "
                    "without a table, such as rope or alibi"
                )


def check_backend(description: ModelSpec) -> None:
    """Refuses an implementation of attention that this platform does not run.

    Raises:
        ConfigError: naming the backend and the platform.
    """
    for name in {layer.backend for layer in description.layers} - {"auto"}:
        runs_on = attention.BACKENDS[name].platforms
        if platform() not in runs_on:
            raise ConfigError(
                f"model.backend={name} runs on {', '.join(runs_on)}, this is a {platform()}: "
                "set --config.model.backend=auto"
            )


def check_params(cfg: Any, params: decoder.Params) -> None:
    """Refuses parameters that are not those of the model in `cfg`; what it does not use may stay.

    Raises:
        ConfigError: naming the first parameter that is missing or of another shape.
    """
    _check_params(spec(cfg), params)


def _check_params(description: ModelSpec, params: decoder.Params) -> None:
    if isinstance(params.get("layers", {}).get("0"), list):
        return  # taken apart for decoding, after they were checked
    narrow = lambda leaf: isinstance(leaf, Int8)  # noqa: E731
    found = dict(jax.tree_util.tree_leaves_with_path(params, is_leaf=narrow))
    for path, wanted in jax.tree_util.tree_leaves_with_path(decoder.shapes(description)):
        there = found[path].shape if path in found else "absent"
        if there != wanted.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ConfigError(
                f"the parameters are of another model: {name} is {there}, this config has it "
                f"{wanted.shape}: change only what needs no other weights, such as positions or "
                "window, or train a model of this shape"
            )


def only_used(cfg: Any, params: decoder.Params) -> decoder.Params:
    """The parameters that the model in `cfg` has, of a tree that may hold more."""

    def pick(wanted: Any, found: Any) -> Any:
        if isinstance(wanted, dict):
            return {name: pick(each, found[name]) for name, each in wanted.items()}
        return found

    return pick(decoder.shapes(spec(cfg)), params)


def _check_tokens(tokens_BL: Tokens) -> None:
    _check_integers("tokens", tokens_BL)
    if tokens_BL.ndim != 2 or not tokens_BL.size:
        raise ValueError(
            f"tokens have shape {tokens_BL.shape}: give [B, L], one row and one token or more"
        )


def _check_integers(what: str, found: Any) -> None:
    dtype = getattr(found, "dtype", f"a {type(found).__name__}")
    if not hasattr(found, "dtype") or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{what} are {dtype}: give an array of int32, [B, L]")


def _check_context(context: Context, shape: tuple[int, int]) -> None:
    """Refuses what is not for each token, and places and segments that are no integers."""
    for name, own in context._asdict().items():
        if own is not None and jnp.shape(own) != shape:
            what = name.removesuffix("_BL")
            raise ValueError(f"context: {what} {jnp.shape(own)} for tokens {shape}: give [B, L]")
        if name not in ("pace_BL", "interval_BL"):
            _check_integers(f"context: {name.removesuffix('_BL')}", own)


def _check_state(description: ModelSpec, state: State, rows: int) -> None:
    """Refuses a state with other layers than the model has, or of another number of rows.

    Sizes of what a recurrence keeps are its own to check (`lcm.nn.recurrent`).
    """
    if not isinstance(state, State):
        raise ValueError(f"the state is a {type(state).__name__}: make it with init_state")
    if len(state.used_B) != rows:
        raise ValueError(
            f"a state of {len(state.used_B)} rows for {rows} rows of tokens: make it "
            f"with init_state(cfg, {rows}, ...)"
        )
    found, wanted = (" + ".join(map(_form, each)) for each in (state.layers, _empty(description)))
    if found != wanted:
        raise ValueError(
            f"the state is of another config, of {found}, this one has {wanted}: make it with "
            "init_state of this config"
        )


@functools.cache
def _empty(description: ModelSpec) -> tuple[Any, ...]:
    return jax.eval_shape(lambda: decoder.init_state(description, 1, 1)).layers


def _form(layers: Any) -> str:
    """What the state of a kind of layers has at any number of rows and slots, in words."""
    count = jax.tree.leaves(layers)[0].shape[0]
    if isinstance(layers, RecurrentState):
        return f"{count} recurrent"
    k, v = layers.k_BGSK.shape, layers.v_BGSK.shape
    return f"{count} of attention with {k[2]} heads of {k[-1]} and {v[-1]}"


def _check_pace(description: ModelSpec, context: Context) -> None:
    """Refuses times for layers that would not follow them; attention has no clock to set."""
    if context.pace_BL is None:
        return
    mixers = {layer.mixer for layer in description.layers if not layer.attends}
    paced = sorted(name for name, mixer in MIXERS.items() if getattr(mixer, "PACED", False))
    if not mixers or not mixers <= set(paced):
        found = ", ".join(sorted(mixers)) or "of attention alone"
        raise ConfigError(
            f"the context has a pace, and layers {found} "
            f"do not follow it: use {', '.join(paced)}, or leave pace_BL None"
        )


def _check_length(description: ModelSpec, tokens_BL: Tokens, state: State | None) -> None:
    length = tokens_BL.shape[1]
    if state is None:
        return check_limit(description, length)
    caches = [layer for layer in state.layers if hasattr(layer, "slots") and not layer.chunk]
    if caches and not isinstance(state.used_B, jax.core.Tracer):
        slots, used = caches[0].slots, int(state.used_B.max())
        if used + length > slots:
            raise ValueError(
                f"{length} tokens do not fit the state: {used} of its {slots} places are used; "
                "make it longer with init_state"
            )


@functools.cache
def _parameters(description: ModelSpec) -> int:
    return cost.parameters(description)


def parameter_count(cfg: Any) -> int:
    """Number of parameters, without making them."""
    return _parameters(spec(cfg))


def flops_per_token(cfg: Any, length: int) -> float:
    """Matmul FLOPs of training on one token of a sequence of `length`; see lcm.models.cost."""
    return cost.flops_per_token(spec(cfg), length)


def state_bytes_per_token(cfg: Any) -> int:
    """Bytes by which the decoding state of a sequence grows with each token it holds."""
    return cost.state_bytes_per_token(spec(cfg))
