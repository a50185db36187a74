"""Beam search: the likeliest texts that a beam of prefixes finds."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm.decoding import programs
from lcm.decoding.context import fitted
from lcm.decoding.engine import Engine, Reader, bucket, check
from lcm.decoding.history import History, begin, observe, take
from lcm.decoding.processors import Chain, chain, process
from lcm.decoding.requests import Request
from lcm.decoding.settings import Sampling, plan
from lcm.decoding.texts import Generation, Prompt, listed, requests_of, settings_of
from lcm.errors import UserError
from lcm.models import ModelSpec, State
from lcm.types import Array

# Settings of draws.
DRAWING = {"temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon", "eta", "seed"}


def beam_search(
    model: Any,
    prompts: Prompt | list[Prompt],
    *,
    beams: int = 4,
    n: int = 1,
    length_penalty: float = 1.0,
    full: str = "refuse",
    engine: dict[str, Any] | None = None,
    **sampling: Any,
) -> list[Generation]:
    """The `n` best texts for each prompt, by `log P / length^length_penalty`.

    Each step looks at the (1 + stop tokens) B likeliest continuations of B beams, at 2 B at least,
    so that B of them go on though all others end. The search is over when no beam can still beat
    the worst of n finished texts, whose number of tokens counts the stop token. Settings that
    change the model's distribution count in P.

    Raises:
        UserError: for settings, or prompts, that cannot be.
    """
    if not 1 <= n <= beams:
        raise UserError(f"n={n} texts of beams={beams}: give 1 <= n <= beams")
    for name in sampling.keys() & DRAWING:
        raise UserError(f"{name}={sampling[name]} is for draws, beam search has none: leave it out")
    settings = settings_of(model, sampling)
    requests = requests_of(model, listed(prompts), settings)
    if not requests:
        return []
    longest = max(request.tokens for request in requests)
    machine = Engine(fitted(model, longest, full), rows=beams, **(engine or {}))
    for request in requests:
        check(machine.spec, machine.tokenizer, request)
    found = []
    for number, request in enumerate(requests):
        best = _Search(machine, request, beams, n, length_penalty).run()
        found += [_generation(machine, number, request.sampling, text) for text in best]
    return found


class _Text(NamedTuple):
    """Tokens with the log-probability of each, and what they are ranked by."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: float


class _Search:
    """The beams of one prompt."""

    def __init__(
        self, engine: Engine, request: Request, beams: int, n: int, penalty: float
    ) -> None:
        self.engine, self.sampling, self.n, self.penalty = engine, request.sampling, n, penalty
        self.most = request.sampling.max_new_tokens
        vocab = engine.spec.vocab
        settings = [request.sampling] * beams
        design = plan(settings, vocab, request.tokens)
        self.chain: Chain = chain(settings, design)
        self.history: History = begin(settings, [request.prompt] * beams, design)
        reader = Reader(engine, [request])
        while not reader.done:
            reader.read()
        self.state = engine.state(beams, bucket(request.tokens))
        for beam in range(beams):
            _, start, count = reader.places[0]
            self.state = programs.insert(self.state, beam, reader.state, start, count)
        self.tokens = np.full(beams, request.prompt[-1], np.int32)
        self.totals = np.array([0.0] + [-np.inf] * (beams - 1), np.float32)  # one at the beginning
        self.live: list[_Text] = [_Text((), (), 0.0)] * beams
        self.finished: list[_Text] = []

    def run(self) -> list[_Text]:
        """The n best texts, best first."""
        for _ in range(self.most):
            self._step()
            if self._over():
                break
        whole = [self._ranked(text) for text in self.live if len(text.tokens) == self.most]
        return sorted(whole + self.finished, key=lambda text: -text.rank)[: self.n]

    def _step(self) -> None:
        beams = len(self.live)
        engine = self.engine
        self.state, found = _candidates(
            engine.spec,
            engine.params,
            self.state,
            self.chain,
            self.history,
            self.tokens,
            self.totals,
            max(2, 1 + len(self.sampling.stop_ids)) * beams,
        )
        totals, parents, tokens = jax.device_get(found)
        chosen = []
        for rank, (total, parent, token) in enumerate(zip(totals, parents, tokens, strict=True)):
            if not np.isfinite(total):
                continue
            before = self.live[parent]
            logprob = float(total - self.totals[parent])
            text = _Text((*before.tokens, int(token)), (*before.logprobs, logprob), 0.0)
            if token in self.sampling.stop_ids:
                if rank < beams:  # a worse one would not have been kept as a beam either
                    self._finish(self._ranked(text))
            elif len(chosen) < beams:
                chosen.append((float(total), int(parent), text))
        missing = beams - len(chosen)
        chosen += [(-np.inf, 0, _Text((), (), 0.0))] * missing
        self.totals = np.array([total for total, _, _ in chosen], np.float32)
        self.live = [text for _, _, text in chosen]
        self.tokens = np.array(
            [text.tokens[-1] if text.tokens else 0 for text in self.live], np.int32
        )
        order = np.array([parent for _, parent, _ in chosen], np.int32)
        if (order != np.arange(beams)).any():
            self.state = programs.reorder(self.state, order)
            self.history = take(self.history, order)
        self.history = observe(self.history, self.tokens, np.isfinite(self.totals))

    def _finish(self, text: _Text) -> None:
        self.finished = sorted([*self.finished, text], key=lambda t: -t.rank)[: self.n]

    def _over(self) -> bool:
        """Whether no beam can come before the worst of n finished texts."""
        if not np.isfinite(self.totals).any():
            return True
        if len(self.finished) < self.n:
            return False
        total = float(self.totals.max())
        longest = self.most if self.penalty > 0 else len(self.live[0].tokens) + 1
        return total / longest**self.penalty <= self.finished[-1].rank

    def _ranked(self, text: _Text) -> _Text:
        return text._replace(rank=sum(text.logprobs) / len(text.tokens) ** self.penalty)


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=2)
def _candidates(
    spec: ModelSpec,
    params: Any,
    state: State,
    processors: Chain,
    history: History,
    token_R: Array,
    total_R: Array,
    most: int,
) -> tuple[State, tuple[Array, Array, Array]]:
    """The likeliest continuations: totals, the beams that they are of, and tokens, `[most]`."""
    state, logits_RV = programs.logits(spec, params, state, token_R, jnp.isfinite(total_R))
    _, logits_RV = process(processors, history, logits_RV)
    total_RV = total_R[:, None] + jax.nn.log_softmax(logits_RV, axis=1)
    vocab = total_RV.shape[1]
    totals, at = jax.lax.top_k(total_RV.reshape(-1), min(most, total_RV.size))
    return state, (totals, at // vocab, at % vocab)


def _generation(engine: Engine, prompt: int, sampling: Sampling, text: _Text) -> Generation:
    ended = bool(text.tokens) and text.tokens[-1] in sampling.stop_ids
    kept = text.tokens[:-1] if ended else text.tokens
    written = "" if engine.tokenizer is None else engine.tokenizer.decode(kept)
    finish = "stop" if ended else "length"
    return Generation(prompt, written, text.tokens, text.logprobs, text.logprobs, finish)
