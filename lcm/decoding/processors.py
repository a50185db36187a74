"""Processors of logits: small frozen dataclasses, applied one after another.

Each is a pytree of per-row settings, a field `NAME_R` being the setting NAME of every row, and a
pure function `(history, logits_RV) -> (history, logits_RV)` in float32. Removed entries are -inf.
A setting at its default is an exact identity, bit for bit, so that rows of one batch may differ.

Truncations keep entries of equal value together: `top_k` keeps more than k where the k-th largest
is tied, and `top_p` all of a uniform distribution. Each takes probabilities among what the one
before it left, as in transformers and vLLM.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp

from lcm.decoding.history import History, members
from lcm.decoding.settings import Plan, Sampling
from lcm.decoding.threshold import threshold
from lcm.types import Array

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Sampling)}


class Processor:
    """One step between logits and a draw."""

    def __call__(self, history: History, logits_RV: Array) -> tuple[History, Array]:
        return history, self.change(history, logits_RV)

    def change(self, history: History, x_RV: Array) -> Array:
        """The logits of one that leaves the history as it is."""
        raise NotImplementedError

    @classmethod
    def of(cls, settings: Sequence[Sampling], plan: Plan) -> Self:
        return cls(*(_per_row(settings, name) for name in cls.reads()))

    @classmethod
    def reads(cls) -> tuple[str, ...]:
        """Names of the settings it is made of."""
        return tuple(field.name.rsplit("_", 1)[0] for field in dataclasses.fields(cls))


def _per_row(settings: Sequence[Sampling], name: str) -> Array:
    dtype = jnp.float32 if isinstance(_DEFAULTS[name], float) else jnp.int32
    return jnp.asarray([getattr(sampling, name) for sampling in settings], dtype)


def _processor(cls: type) -> type:
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


# Constraints and the end of the text


@_processor
class Banned(Processor):
    """Tokens that are never drawn."""

    banned_RV: Array

    @classmethod
    def of(cls, settings: Sequence[Sampling], plan: Plan) -> Self:
        return cls(members([sampling.banned for sampling in settings], plan.vocab))

    def change(self, history: History, x_RV: Array) -> Array:
        return jnp.where(self.banned_RV, -jnp.inf, x_RV)


@_processor
class MinNewTokens(Processor):
    """No end before so many generated tokens."""

    min_new_tokens_R: Array

    def change(self, history: History, x_RV: Array) -> Array:
        early_R = history.new_R < self.min_new_tokens_R
        return jnp.where(early_R[:, None] & history.stops_RV, -jnp.inf, x_RV)


@_processor
class LengthDecay(Processor):
    """After t > start tokens the end gains `|logit| (decay^(t - start) - 1)`, as in transformers.

    The gain is bounded at 1e30 |logit|, which float32 holds.
    """

    length_decay_R: Array
    length_decay_start_R: Array

    def change(self, history: History, x_RV: Array) -> Array:
        late_R = jnp.maximum(history.new_R - self.length_decay_start_R, 0)
        gain_R = jnp.minimum(self.length_decay_R ** late_R.astype(jnp.float32), 1e30) - 1
        changed_R = (late_R > 0) & (self.length_decay_R != 1)
        changed_RV = changed_R[:, None] & history.stops_RV & jnp.isfinite(x_RV)
        return jnp.where(changed_RV, x_RV + jnp.abs(x_RV) * gain_R[:, None], x_RV)


# Penalties on what was said, on raw logits: the first is not invariant to a shift of them


@_processor
class Repetition(Processor):
    """Positive logits of tokens in the window are divided by the penalty, others multiplied.

    CTRL, 1909.05858; with a window, the forgetting of penalty decoding, 2310.14971. A token that
    has left the window, and one that ends the text, has its original logit.
    """

    repetition_penalty_R: Array

    def change(self, history: History, x_RV: Array) -> Array:
        penalty_R1 = self.repetition_penalty_R[:, None]
        penalised_RV = jnp.where(x_RV > 0, x_RV / penalty_R1, x_RV * penalty_R1)
        return jnp.where((history.seen_RV > 0) & ~history.stops_RV, penalised_RV, x_RV)


@_processor
class Frequency(Processor):
    """`logit - frequency * count - presence * [count > 0]`, counts among generated tokens."""

    frequency_penalty_R: Array
    presence_penalty_R: Array

    def change(self, history: History, x_RV: Array) -> Array:
        count_RV = history.written_RV.astype(jnp.float32)
        presence_RV = jnp.where(count_RV > 0, self.presence_penalty_R[:, None], 0)
        return x_RV - self.frequency_penalty_R[:, None] * count_RV - presence_RV


@_processor
class EosPenalty(Processor):
    """The end loses `penalty * max(0, 1 - t / length)` after t generated tokens.

    The length penalty of penalty decoding, 2310.14971: penalties on all else inflate the end. An
    infinite one forbids it before `length`. The published formula is not known; this is ours.
    """

    eos_penalty_R: Array
    eos_penalty_length_R: Array

    def change(self, history: History, x_RV: Array) -> Array:
        share_R = 1 - history.new_R / jnp.maximum(self.eos_penalty_length_R, 1)
        changed_R = (history.new_R < self.eos_penalty_length_R) & (self.eos_penalty_R > 0)
        loss_R = jnp.where(changed_R, self.eos_penalty_R * share_R, 0)
        return jnp.where(history.stops_RV, x_RV - loss_R[:, None], x_RV)


@_processor
class NoRepeatNgram(Processor):
    """Removes tokens that would complete an n-gram that is there, in prompt or generation.

    A row in which that would leave nothing is left alone.
    """

    no_repeat_ngram_R: Array

    def change(self, history: History, x_RV: Array) -> Array:
        recent_RW, length_R1 = history.recent_RW, history.length_R[:, None]
        n_R1, width = self.no_repeat_ngram_R[:, None], recent_RW.shape[1]
        slot_W = jnp.arange(width)
        position_RW = length_R1 - 1 - (length_R1 - 1 - slot_W) % width
        oldest_R1 = jnp.maximum(length_R1 - width, 0)
        ends_RW = (n_R1 > 0) & (position_RW - (n_R1 - 1) >= oldest_R1)

        def same(back: Array, ends_RW: Array) -> Array:
            """Those whose token `back` places before equals the one `back` before the next."""
            last_R1 = jnp.take_along_axis(recent_RW, (length_R1 - back) % width, axis=1)
            return ends_RW & ((back >= n_R1) | (jnp.roll(recent_RW, back, axis=1) == last_R1))

        ends_RW = jax.lax.fori_loop(1, jnp.max(n_R1), same, ends_RW)
        rows_R1 = jnp.arange(len(x_RV))[:, None]
        completing = (rows_R1, jnp.where(ends_RW, recent_RW, x_RV.shape[1]))
        left_RV = x_RV.at[completing].set(-jnp.inf, mode="drop")
        return jnp.where(jnp.any(left_RV > -jnp.inf, axis=1, keepdims=True), left_RV, x_RV)


# The shape of the distribution


@_processor
class Temperature(Processor):
    """Logits over the temperature; at 0 all but the largest is removed, the first one on ties."""

    temperature_R: Array

    def change(self, history: History, x_RV: Array) -> Array:
        t_R1 = self.temperature_R[:, None]
        first_RV = jnp.arange(x_RV.shape[1]) == largest(x_RV)[:, None]
        return jnp.where(t_R1 == 0, _keep(x_RV, first_RV), x_RV / jnp.where(t_R1 == 0, 1, t_R1))


@_processor
class TopK(Processor):
    """Keeps what is at least the k-th largest."""

    top_k_R: Array

    def change(self, history: History, x_RV: Array) -> Array:
        count_R = jnp.where(self.top_k_R > 0, self.top_k_R, x_RV.shape[1])
        return _keep(x_RV, x_RV >= threshold(x_RV, jnp.ones_like(x_RV), count_R)[:, None])


@_processor
class TopP(Processor):
    """Keeps tokens for which all likelier ones have together less than p (1904.09751)."""

    top_p_R: Array

    def change(self, history: History, x_RV: Array) -> Array:
        t_R = threshold(x_RV, jax.nn.softmax(x_RV, axis=1), self.top_p_R)
        return _keep(x_RV, (x_RV >= t_R[:, None]) | (self.top_p_R == 1)[:, None])


@_processor
class MinP(Processor):
    """Keeps tokens at least `min_p` times as likely as the likeliest (2407.01082)."""

    min_p_R: Array

    def change(self, history: History, x_RV: Array) -> Array:
        return _keep_likely(x_RV, x_RV, jnp.max(x_RV, axis=1) + jnp.log(self.min_p_R))


@_processor
class Typical(Processor):
    """Keeps the mass tau of those whose surprise is nearest to the entropy (2202.00666)."""

    typical_p_R: Array

    def change(self, history: History, x_RV: Array) -> Array:
        logp_RV = jax.nn.log_softmax(x_RV, axis=1)
        # Once: made again for the comparison it may be rounded otherwise, and the last to stay go.
        near_RV = jax.lax.optimization_barrier(-jnp.abs(logp_RV + entropy(logp_RV)[:, None]))
        t_R = threshold(near_RV, jnp.exp(logp_RV), self.typical_p_R)
        return _keep(x_RV, (near_RV >= t_R[:, None]) | (self.typical_p_R == 1)[:, None])


@_processor
class Epsilon(Processor):
    """Keeps tokens of probability at least epsilon, and the likeliest (2210.15191)."""

    epsilon_R: Array

    def change(self, history: History, x_RV: Array) -> Array:
        return _keep_likely(x_RV, jax.nn.log_softmax(x_RV, axis=1), jnp.log(self.epsilon_R))


@_processor
class Eta(Processor):
    """Keeps probabilities of at least `min(eta, sqrt(eta) exp(-H))`, and the likeliest."""

    eta_R: Array

    def change(self, history: History, x_RV: Array) -> Array:
        logp_RV, log_eta_R = jax.nn.log_softmax(x_RV, axis=1), jnp.log(self.eta_R)
        floor_R = jnp.minimum(log_eta_R, log_eta_R / 2 - entropy(logp_RV))
        return _keep_likely(x_RV, logp_RV, floor_R)


def _keep(x_RV: Array, kept_RV: Array) -> Array:
    return jnp.where(kept_RV, x_RV, -jnp.inf)


def _keep_likely(x_RV: Array, logp_RV: Array, floor_R: Array) -> Array:
    """Those of a floor and more, and the likeliest, however a floor next to it is rounded."""
    likeliest_RV = x_RV == jnp.max(x_RV, axis=1, keepdims=True)
    return _keep(x_RV, (logp_RV >= floor_R[:, None]) | likeliest_RV)


def entropy(logp_RV: Array) -> Array:
    """Entropy in nats, `[R]`; impossible entries count nothing."""
    return -jnp.sum(jnp.where(logp_RV > -jnp.inf, jnp.exp(logp_RV) * logp_RV, 0), axis=1)


def largest(x_RV: Array) -> Array:
    """The first index of the largest entry, int32 `[R]`.

    `argmax` in two plain reductions, which XLA runs four times as fast on a CPU as its one of
    pairs. A row with a NaN has the last index, and a NaN for its log-probability.
    """
    size = x_RV.shape[1]
    index_RV = jnp.where(x_RV == jnp.max(x_RV, axis=1, keepdims=True), jnp.arange(size), size - 1)
    return jnp.min(index_RV, axis=1).astype(jnp.int32)


ORDER: tuple[type[Processor], ...] = (
    Banned,
    MinNewTokens,
    LengthDecay,
    Repetition,
    Frequency,
    EosPenalty,
    NoRepeatNgram,
    Temperature,
    TopK,
    TopP,
    MinP,
    Typical,
    Epsilon,
    Eta,
)

Chain = tuple[Processor, ...]


def chain(settings: Sequence[Sampling], plan: Plan) -> Chain:
    """The processors that some row of the plan uses, with the settings of these rows.

    Which there are is of the plan, and static. Where no row draws at random there is no
    temperature: the largest logit is taken in the end, and beams have whole distributions.
    """
    plan.check(settings)
    uses = plan.uses - {"temperature"} if plan.greedy else plan.uses
    return tuple(cls.of(settings, plan) for cls in ORDER if uses & set(cls.reads()))


def process(chain: Chain, history: History, logits_RV: Array) -> tuple[History, Array]:
    """Logits through every processor, in float32."""
    logits_RV = logits_RV.astype(jnp.float32)
    for processor in chain:
        history, logits_RV = processor(history, logits_RV)
    return history, logits_RV
