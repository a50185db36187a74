"""What the recurrent states of a batch begin with, and what a step keeps of them for the next.

    zero        nothing, as a document does that is read alone
    noise       N(0, initial_std^2), one deviation for all layers and heads
    fitted      N(mean, std^2) of each head's final states in the batch before
    passed      final states of the batch before, of other rows: of T, 2 T, 3 T ... tokens
    continued   those of the same rows, which the data must go on from: truncated BPTT (TBTT)

The interventions of Ruiz and Gu, 2025, arXiv:2507.02782, section 4; that of states passed on is
LongSSM's too (arXiv:2406.02080). No gradient goes through a state. The document that a row begins
with joins its state, those behind it begin from nothing. Passed and continued states have the last
inputs of convolutions with them; attention beside recurrent layers sees its own row alone.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.models import ModelSpec, State, decoder, initial
from lcm.nn import RecurrentState
from lcm.types import Array, Context

KINDS = ("zero", "noise", "fitted", "passed", "continued")


def check(spec: ModelSpec, train: Any) -> None:
    """Refuses a start that there is not, or that the model has no state for.

    Raises:
        ConfigError: naming the value and the remedy.
    """
    kind = train.initial_state
    if kind not in KINDS:
        raise ConfigError(
            f"train.initial_state={kind!r} is unknown: choose from {', '.join(KINDS)}"
        )
    if kind != "zero" and all(layer.attends for layer in spec.layers):
        raise ConfigError(
            f"train.initial_state={kind} is of recurrent states, and model.pattern has attention "
            "alone: set it to zero, or name a recurrent mixer in the pattern"
        )
    if train.initial_std < 0:
        raise ConfigError(f"train.initial_std={train.initial_std} is negative: 0 draws nothing")


def init(spec: ModelSpec, train: Any) -> Any:
    """What is carried before the first step, from which that begins as from zero; None if nothing.

    Plain dicts and lists, which a checkpoint holds: of `fitted` a mean and a deviation of each
    head, of `passed` and `continued` `position_B`, that of the next token, and states by kind.

    Raises:
        ConfigError: as `check`.
    """
    check(spec, train)
    if train.initial_state in ("zero", "noise"):
        return None
    if train.initial_state == "fitted":
        return initial.fitted(_empty(spec, 1))._asdict()
    return _plain(_empty(spec, train.batch))


def begin(
    spec: ModelSpec, train: Any, carried: Any, step: Array, key: jax.Array, context: Context
) -> State | None:
    """The state that the rows of a batch begin with, in the segment of their first token.

    Its `used_B` is where they stand: 0, or behind the rows before. What is kept of the batch before
    is there from the second step on; rows of the first begin as documents do.
    """
    kind, batch = train.initial_state, context.segments_BL.shape[0]
    if kind == "zero":
        return None
    empty = _empty(spec, batch)
    if kind in ("noise", "fitted"):
        if kind == "fitted":
            fit = initial.Fit(**carried)
        else:
            none = initial.fitted(_empty(spec, 1))
            std = jax.tree.map(lambda x: jnp.full_like(x, train.initial_std), none.std)
            fit = initial.Fit(none.mean, std)
        state = initial.drawn(key, fit, empty)
    else:
        state = _stateful(empty, carried)
        if kind == "passed":
            state = initial.rows(state, jax.random.permutation(key, batch))
    there = (step > 0) | (kind == "noise")
    return initial.joined(state, jnp.where(there, _first_segment(context), 0))


def placed(spec: ModelSpec, context: Context, state: State | None) -> Context:
    """The context of rows that go on from a state: their first document's positions go on, too.

    Attention, which has no tokens from before, keeps the row's own positions.
    """
    if state is None or any(layer.attends for layer in spec.layers):
        return context
    first_BL = context.segments_BL == _first_segment(context)[:, None]
    return context._replace(positions_BL=context.positions_BL + first_BL * state.used_B[:, None])


def kept(train: Any, after: State | None) -> Any:
    """What is carried on of the final states."""
    if train.initial_state in ("zero", "noise"):
        return None
    after = initial.passed(after)
    return initial.fitted(after)._asdict() if train.initial_state == "fitted" else _plain(after)


def rows_first(state: State | None) -> State | None:
    """The state with the axis of rows before that of layers, or back."""
    if state is None:
        return None
    return State(state.used_B, jax.tree.map(lambda x: x.swapaxes(0, 1), state.layers))


def ended(state: State, context: Context) -> State:
    """The state with the position of the next token for the number of those it has seen."""
    last_B = jnp.where(context.segments_BL > 0, context.positions_BL + 1, 0)
    at_B = jnp.where(context.segments_BL > 0, jnp.arange(context.segments_BL.shape[1]), -1)
    at_B = at_B.argmax(1)
    return state._replace(used_B=jnp.take_along_axis(last_B, at_B[:, None], 1)[:, 0])


def _first_segment(context: Context) -> Array:
    """The segment of the first token of each row that is none of padding, `[B]`."""
    segments_BL = context.segments_BL
    at_B = (segments_BL > 0).argmax(1)
    return jnp.take_along_axis(segments_BL, at_B[:, None], 1)[:, 0]


def _empty(spec: ModelSpec, batch: int) -> State:
    """The empty state of recurrent layers; attention has none."""
    state = decoder.init_state(spec, batch, 1)
    recurrent = (x if isinstance(x, RecurrentState) else None for x in state.layers)
    return State(state.used_B, tuple(recurrent))


def _plain(state: State) -> dict[str, Any]:
    layers = {
        str(i): {"memory": layer.memory, "tails": list(layer.tails)}
        for i, layer in enumerate(state.layers)
        if layer is not None
    }
    return {"position_B": state.used_B, "layers": layers}


def _stateful(like: State, plain: dict[str, Any]) -> State:
    def filled(i: int, layer: RecurrentState | None) -> RecurrentState | None:
        if layer is None:
            return None
        own = plain["layers"][str(i)]
        return RecurrentState(own["memory"], tuple(own["tails"]), layer.segment_B)

    layers = tuple(filled(i, layer) for i, layer in enumerate(like.layers))
    return State(plain["position_B"], layers)
