"""How much of a text's beginning a model's prediction still rests on, and how its states grow."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm import models
from lcm.errors import ConfigError, UserError
from lcm.models import initial
from lcm.types import Tokens


def effective_remembrance(
    cfg: Any, params: Any, tokens_BL: Tokens, starts: Sequence[int]
) -> np.ndarray:
    """Total variation of the next token's distribution with and without the first tokens.

    `EffRem_T(t) = TV(q(. | x[0:T]), q(. | x[t:T]))`, mean over rows, `TV = 1/2 sum |p - q|` (Ruiz
    and Gu, 2025, arXiv:2507.02782, section 3.2): near 0 where what stands before t does not
    matter, high where a model hangs on to what is long past.

    Args:
        tokens_BL: T tokens of each row.
        starts: values of t; one pass of the model each.

    Raises:
        UserError: for a start outside the tokens.
    """
    length = tokens_BL.shape[1]
    for start in starts:
        if not 0 <= start < length:
            raise UserError(
                f"start {start} leaves nothing of {length} tokens: take values from 0 to "
                f"{length - 1}"
            )
    spec = models.spec(cfg)
    whole_BV = _last(spec, params, tokens_BL, 0)
    found = []
    for start in starts:
        apart = jnp.abs(whole_BV - _last(spec, params, tokens_BL, start)).sum(-1) / 2
        found.append(float(apart.mean()))
    return np.array(found)


@partial(jax.jit, static_argnums=0)
def _last(spec: models.ModelSpec, params: Any, tokens_BL: Tokens, start: int) -> Any:
    """Probabilities after the last token of what stands from `start` on, `[B, V]`.

    What stands before is padding, so that one program serves all starts.
    """
    plain = models.default_context(tokens_BL.shape)
    there = plain.positions_BL >= start
    positions_BL = jnp.maximum(plain.positions_BL - start, 0)
    at = plain._replace(positions_BL=positions_BL, segments_BL=plain.segments_BL * there)
    x_BLD, _ = models.decoder.hidden(spec, params, tokens_BL, at, None)
    logits = models.decoder.logits(spec, params, x_BLD[:, -1:])
    return jax.nn.softmax(logits[:, 0])


def state_norms(cfg: Any, params: Any, tokens_BL: Tokens, every: int) -> list[np.ndarray]:
    """Norms of the states of heads after each `every` tokens, `[T / every, n, B, H]` for each array
    of each kind of recurrent layers.

    Those of a model that fails beyond its trained length keep growing there.

    Raises:
        ConfigError: for a model whose layers keep no such state.
        UserError: for tokens that `every` does not divide.
    """
    batch, length = tokens_BL.shape
    if every < 1 or length % every or not length:
        raise UserError(f"every={every} does not divide {length} tokens: take a divisor of them")
    state, found = models.init_state(cfg, batch, length), []
    if not jax.tree.leaves(initial.norms(state)):
        raise ConfigError(
            "this model has no recurrent layer, or those have convolutions and windows alone, and "
            "so no state whose norm could grow: take one such as mamba2"
        )
    for start in range(0, length, every):
        _, state = models.apply(cfg, params, tokens_BL[:, start : start + every], state=state)
        found.append(jax.device_get(jax.tree.leaves(initial.norms(state))))
    return [np.stack(each) for each in zip(*found, strict=True)]
