"""The compiled programs of the engine: read a chunk of a prompt, take over a row, make one token.

Each is compiled once per model, and per size of what it is given; states are given away to be
written where they lie.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcm.decoding import history as histories
from lcm.decoding.history import History, observe
from lcm.decoding.processors import Chain
from lcm.decoding.sampling import Drawn, sample
from lcm.models import ModelSpec, State, decoder
from lcm.types import Array, Context, Tokens


class Rows(NamedTuple):
    """What the engine keeps of R requests on the device beside their state.

    token_R: the last token of each, which no layer has seen yet.
    active_R: rows that hold a request.
    """

    token_R: Array
    active_R: Array
    chain: Chain
    key_R: Array | None
    history: History


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(spec: ModelSpec, params: Any, state: State, tokens_BL: Tokens, at: Context) -> State:
    """The state after more tokens of prompts, whose logits nobody needs."""
    return decoder.hidden(spec, params, tokens_BL, at, state)[1]


def take_over(
    state: State, rows: Rows, row: int, one: State, start: int, count: int, new: Rows
) -> tuple[State, Rows]:
    """A request's tokens of a prefilled state, and what else there is of it, in a row."""
    return insert(state, row, one, start, count), _replace(rows, jnp.int32(row), new)


def insert(state: State, row: int, one: State, start: int, count: int) -> State:
    """The state with `count` tokens of a prefilled one, from slot `start` on, in a row.

    Layer by layer, as one small program serves all that are alike.
    """
    row, start, count = (jnp.int32(x) for x in (row, start, count))
    put = lambda mine, other: _insert(mine, row, other, start, count)  # noqa: E731
    layers = decoder.over_layers(put, state.layers, one.layers)
    return State(_set(state.used_B, row, count), layers)


def first(state: State, count: int, slots: int) -> State:
    """The state of the first `count` tokens, with room for `slots` of them."""
    count = jnp.int32(count)
    layers = decoder.over_layers(lambda x: _first(x.longer(slots), count), state.layers)
    return State(jnp.minimum(state.used_B, count), layers)


def reorder(state: State, row_R: Array) -> State:
    """Some rows of a state, in any order, any of them more than once."""
    layers = decoder.over_layers(lambda layer: _rows(layer, row_R), state.layers)
    return State(state.used_B[row_R], layers)


@partial(jax.jit, donate_argnums=0)
def _insert(mine: Any, row: Array, other: Any, start: Array, count: Array) -> Any:
    return mine.insert(row, other, start, count)


@jax.jit
def _first(layer: Any, count: Array) -> Any:
    return layer.first(count)


@jax.jit
def _rows(layer: Any, row_R: Array) -> Any:
    return layer.rows(row_R)


@partial(jax.jit, donate_argnums=0)
def _set(x_R: Array, row: Array, value: Array) -> Array:
    return x_R.at[row].set(value)


@partial(jax.jit, donate_argnums=0)
def _replace(rows: Rows, row: Array, new: Rows) -> Rows:
    return histories.insert(rows, row, new)


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def step(spec: ModelSpec, params: Any, state: State, rows: Rows) -> tuple[State, Rows, Drawn]:
    """One more token of every active row; the others stay as they are."""
    state, logits_RV = logits(spec, params, state, rows.token_R, rows.active_R)
    history, drawn = sample(rows.chain, rows.key_R, rows.history, logits_RV)
    history = observe(history, drawn.token_R, rows.active_R)
    token_R = jnp.where(rows.active_R, drawn.token_R, rows.token_R)
    return state, rows._replace(token_R=token_R, history=history), drawn


def logits(
    spec: ModelSpec, params: Any, state: State, token_R: Array, active_R: Array
) -> tuple[State, Array]:
    """The state after one token of every active row, and the logits `[R, V]` of the next."""
    at_R1, there_R1 = state.used_B[:, None], active_R[:, None].astype(jnp.int32)
    at = Context(at_R1, there_R1, jnp.full_like(at_R1, -1))
    x_BLD, state = decoder.hidden(spec, params, token_R[:, None], at, state)
    return state, decoder.logits(spec, params, x_BLD)[:, 0]


def release(rows: Rows, row: int) -> Rows:
    """The rows with one of them free again."""
    return rows._replace(active_R=_set(rows.active_R, jnp.int32(row), jnp.bool_(False)))
