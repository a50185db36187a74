"""What processors know about the tokens so far, kept up to date in O(1) per token.

R rows, each a request of its own length; W tokens remembered, V entries of the vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm.decoding.settings import Plan, Sampling
from lcm.types import Array

UNLIMITED = 1 << 30  # a window that no sequence is longer than

_READ_STOPS = {"min_new_tokens", "length_decay", "repetition_penalty", "eos_penalty"}
_READ_WRITTEN = {"frequency_penalty", "presence_penalty"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """Tokens so far of each row; what no row of the plan needs is None, or of width 0.

    length_R: tokens of prompt and generation.
    new_R: tokens generated.
    window_R: how many of the last tokens `seen` counts.
    recent_RW: the last W tokens; the token at position n is in slot n mod W.
    seen_RV: counts among the last `window` tokens of prompt *and* generation, for the repetition
        penalty: as CTRL (1909.05858), transformers and vLLM have it.
    written_RV: counts among *generated* tokens alone, for frequency and presence penalties: the
        definition of OpenAI's API ("how often that token was sampled prior to the current
        position"), which vLLM follows; transformers has neither penalty.
    stops_RV: which tokens end the text.
    """

    length_R: Array
    new_R: Array
    window_R: Array
    recent_RW: Array
    seen_RV: Array | None
    written_RV: Array | None
    stops_RV: Array | None


def begin(settings: Sequence[Sampling], prompts: Sequence[Any], plan: Plan) -> History:
    """The history of rows that have read their prompts (ids, `[n]` each) and generated nothing."""
    plan.check(settings)
    windows = [plan.window(sampling) for sampling in settings]
    prompts = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
    pairs = zip(prompts, windows, strict=True)
    last = [p if w is None else p[max(0, len(p) - w) :] for p, w in pairs]
    zeros = jnp.zeros((len(settings), plan.vocab), jnp.int32)
    return History(
        length_R=jnp.asarray([len(prompt) for prompt in prompts], jnp.int32),
        new_R=jnp.zeros(len(settings), jnp.int32),
        window_R=jnp.asarray([UNLIMITED if w is None else w for w in windows], jnp.int32),
        recent_RW=jnp.asarray([_ring(prompt, plan.ring) for prompt in prompts]),
        seen_RV=_counts(last, plan.vocab) if "repetition_penalty" in plan.uses else None,
        written_RV=zeros if _READ_WRITTEN & plan.uses else None,
        stops_RV=members([s.stop_ids for s in settings], plan.vocab)
        if _READ_STOPS & plan.uses
        else None,
    )


def observe(history: History, token_R: Array, active_R: Array) -> History:
    """The history with one more generated token in each active row; other rows are unchanged.

    A token enters the counts with +1, and the one that leaves its row's window with -1.
    """
    rows, step_R = jnp.arange(len(token_R)), active_R.astype(jnp.int32)
    add = lambda counts_RV, ids_R, by_R: counts_RV.at[rows, ids_R].add(by_R)  # noqa: E731
    n_R, recent_RW, seen_RV = history.length_R, history.recent_RW, history.seen_RV
    if seen_RV is not None:
        seen_RV = add(seen_RV, token_R, jnp.where(history.window_R > 0, step_R, 0))
    if width := recent_RW.shape[1]:
        if seen_RV is not None:
            leaves_R = (history.window_R > 0) & (history.window_R <= n_R)
            gone_R = recent_RW[rows, (n_R - history.window_R) % width]
            seen_RV = add(seen_RV, gone_R, jnp.where(leaves_R, -step_R, 0))
        slot = (rows, n_R % width)
        recent_RW = recent_RW.at[slot].set(jnp.where(active_R, token_R, recent_RW[slot]))
    written_RV = history.written_RV
    if written_RV is not None:
        written_RV = add(written_RV, token_R, step_R)
    return dataclasses.replace(
        history,
        length_R=n_R + step_R,
        new_R=history.new_R + step_R,
        recent_RW=recent_RW,
        seen_RV=seen_RV,
        written_RV=written_RV,
    )


def insert(rows: Any, row: int | Array, one: Any) -> Any:
    """A history, a chain or keys of R rows with `row` replaced by the only row of `one`.

    Both must be of one plan. `row` may be traced, so that one program serves every row.
    """
    return jax.tree.map(lambda all_, new: all_.at[row].set(new[0]), rows, one)


def take(rows: Any, which_R: Array) -> Any:
    """Rows of a history, a chain or keys in another order, some perhaps twice, as beams need."""
    return jax.tree.map(lambda leaf: leaf[which_R], rows)


def members(ids: Sequence[Sequence[int]], vocab: int) -> Array:
    """Bool `[R, V]`: which tokens are among the ids of each row."""
    mask_RV = np.zeros((len(ids), vocab), bool)
    for row, tokens in enumerate(ids):
        mask_RV[row, list(tokens)] = True
    return jnp.asarray(mask_RV)


def _ring(tokens: np.ndarray, width: int) -> np.ndarray:
    """The last `width` tokens in their slots; slots of no token hold 0, and are never read."""
    ring = np.zeros(width, np.int32)
    for position in range(max(0, len(tokens) - width), len(tokens)):
        ring[position % width] = tokens[position]
    return ring


def _counts(tokens: Sequence[np.ndarray], vocab: int) -> Array:
    return jnp.asarray([np.bincount(row, minlength=vocab) for row in tokens], jnp.int32)
