"""Loss against length on held-out documents: the protocols, and `evaluate` which runs them all.

A protocol is a plan of windows over documents; every summary of it follows from the loss of each
token. Documents are scored one by one (no window crosses into another document).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from lcm.errors import ConfigError
from lcm.evaluation import summaries
from lcm.evaluation.documents import Document, EvaluationError, at_least, within_budget
from lcm.evaluation.results import KIND, SCHEMA
from lcm.evaluation.windows import Plan, Score, cut, cut_suffixes, planned_tokens, token_losses

PROTOCOLS = {
    "lengths": "non-overlapping windows of each length over the same tokens of the same documents,"
    " all of which are at least as long as the longest window; positions restart in every window",
    "non-overlapping": "windows of the training length side by side over documents of any length",
    "sliding": "windows of the training length that advance by the stride; a window scores only"
    " the tokens that the one before it did not hold",
    "context": "the last tokens of every span of the longest length, read after more and more of"
    " the text before them; the scored tokens are the same at every context",
    "tokens": "BOS is read, not scored; EOS is scored; documents are never joined",
    "intervals": "percentile bootstrap over documents, paired between lengths",
}


RUN = ("lengths", "non-overlapping", "sliding", "context")  # what a trained run is scored by


@dataclass(frozen=True)
class Settings:
    """What fixes an evaluation, but for the model and the documents.

    stride: advance of the sliding windows. max_tokens: tokens scored per protocol, None for all.
    threshold: the effective length is the largest whose loss, and that of every shorter length,
    is below this multiple of the loss at the shortest. span: documents of the length curve have so
    many tokens, at least; the longest length, or more, so that further lengths share them.
    """

    train_length: int
    multiples: tuple[float, ...]
    stride: int
    batch_tokens: int
    max_tokens: int | None
    seed: int
    replicates: int
    confidence: float
    threshold: float
    span: int = 0

    def lengths(self) -> list[int]:
        """Window lengths from short to long."""
        return sorted({round(multiple * self.train_length) for multiple in self.multiples})

    def suffix(self) -> int:
        """Tokens scored at the end of each span when contexts are compared."""
        return max(1, self.lengths()[0] // 4)


class Job(NamedTuple):
    """Documents and the windows to score on them."""

    documents: list[Document]
    plan: Plan


class Memory(Protocol):
    """Losses of jobs that were done before, by their protocol, length, documents and windows."""

    def find(self, name: str, length: int, job: Job) -> list[np.ndarray] | None: ...

    def keep(self, name: str, length: int, job: Job, losses: list[np.ndarray]) -> None: ...


def evaluate(
    score: Score,
    documents: Sequence[Document],
    *,
    train_length: int,
    multiples: Sequence[float] = (1, 2, 4, 8),
    stride: int | None = None,
    batch_tokens: int = 16_384,
    max_tokens: int | None = 262_144,
    seed: int = 0,
    replicates: int = 10_000,
    confidence: float = 0.95,
    threshold: float = 1.05,
    span: int = 0,
    rows: int = 1,
    protocols: Sequence[str] = RUN,
    memory: Memory | None = None,
    progress: Callable[[int, int], None] | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Loss at multiples of the training length, by position and by context; perplexity; intervals.

    `score(batch)` gives the next-token loss in nats, float32 `[B, L]`, and is called with one
    shape per window length, B a multiple of `rows`. `stride` defaults to half the training length.
    `progress(done, total)` is told the tokens put through the model. Of `protocols`, "lengths" is
    always among them; without the two of windows of the training length, perplexity is that of each
    length. What `memory` finds is not computed again. `about` (run, step, parameters, tokenizer,
    ...) is kept with the result, a dictionary ready for JSON: see `lcm.evaluation.results`.
    Raises EvaluationError for documents that are missing or too short and for losses that are not
    finite, ConfigError for settings that contradict each other.
    """
    settings = Settings(
        train_length=train_length,
        multiples=tuple(multiples),
        stride=max(1, train_length // 2) if stride is None else stride,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        seed=seed,
        replicates=replicates,
        confidence=confidence,
        threshold=threshold,
        span=span,
    )
    _check(settings, documents)
    jobs = {k: job for k, job in _jobs(settings, documents).items() if k[0] in protocols}
    losses = {key: memory.find(*key, job) if memory else None for key, job in jobs.items()}
    todo = {key: job for key, job in jobs.items() if losses[key] is None}
    total = sum(planned_tokens(job.plan, batch_tokens, rows) for job in todo.values())
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress:
            progress(done, total)

    for key, job in todo.items():
        losses[key] = token_losses(
            score, job.documents, job.plan, batch_tokens=batch_tokens, rows=rows, advance=advance
        )
        if memory:
            memory.keep(*key, job, losses[key])
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "about": dict(about or {}),
        "settings": asdict(settings),
        "protocols": PROTOCOLS,
        **_summarise(settings, documents, jobs, losses),
    }


def _check(settings: Settings, documents: Sequence[Document]) -> None:
    """Refuse settings that contradict each other, before anything is computed."""
    if not documents:
        raise EvaluationError("no held-out documents: hold some out of training, or name a source")
    for document in documents:
        if not len(document.tokens_N) or len(document.tokens_N) != len(document.targets_N):
            raise EvaluationError(
                f"document {document.name!r} has {len(document.tokens_N)} tokens and"
                f" {len(document.targets_N)} targets: it needs one target for each of 1 or more"
            )
    for multiple in settings.multiples or (0,):
        length = multiple * settings.train_length
        if length < 1 or abs(length - round(length)) > 1e-6:
            raise ConfigError(
                f"multiple {multiple} of the training length {settings.train_length} is {length}"
                " tokens: give multiples that make whole window lengths of 1 or more"
            )
    longest = max(settings.lengths()[-1], settings.span)
    if settings.max_tokens is not None and settings.max_tokens < longest:
        raise ConfigError(
            f"max_tokens {settings.max_tokens} does not hold one window of the longest length,"
            f" {longest}: raise it to {longest} or more"
        )
    if settings.threshold <= 1:
        raise ConfigError(f"threshold {settings.threshold} must be above 1, such as 1.05")


def _jobs(settings: Settings, documents: Sequence[Document]) -> dict[tuple[str, int], Job]:
    """Everything that goes through the model, by protocol and window length (or context)."""
    lengths, suffix, base = settings.lengths(), settings.suffix(), settings.train_length
    span = max(lengths[-1], settings.span)
    budget = {"span": span, "max_tokens": settings.max_tokens, "seed": settings.seed}
    long = within_budget(at_least(documents, span), **budget)
    every = within_budget(documents, **budget)
    long_sizes = [len(document.tokens_N) for document in long]
    every_sizes = [len(document.tokens_N) for document in every]
    jobs = {("lengths", length): Job(long, cut(long_sizes, length, length)) for length in lengths}
    jobs["non-overlapping", base] = Job(every, cut(every_sizes, base, base))
    jobs["sliding", base] = Job(every, cut(every_sizes, base, settings.stride))
    for length in sorted({max(suffix, lengths[0] // 2), *lengths}):
        context = length - suffix
        plan = cut_suffixes(long_sizes, span=span, suffix=suffix, context=context)
        jobs["context", context] = Job(long, plan)
    return jobs


def _summarise(
    settings: Settings,
    documents: Sequence[Document],
    jobs: Mapping[tuple[str, int], Job],
    losses: Mapping[tuple[str, int], list[np.ndarray]],
) -> dict[str, Any]:
    """Turn the losses of all jobs into the sections of the result."""
    lengths, base = settings.lengths(), settings.train_length
    by_length = {length: losses["lengths", length] for length in lengths}
    by_context = {context: losses[name, context] for name, context in jobs if name == "context"}
    long = jobs["lengths", lengths[0]].documents
    rolled = [(name, n) for name, n in jobs if name in ("non-overlapping", "sliding")]
    read = rolled or [("lengths", length) for length in lengths]
    intervals = summaries.Intervals(settings.replicates, settings.confidence, settings.seed)
    points = summaries.length_points(by_length, base, intervals)
    return {
        "documents": {
            "given": len(documents),
            "long enough": sum(
                len(d.tokens_N) >= max(lengths[-1], settings.span) for d in documents
            ),
            "long": summaries.inventory(long),
            "all": summaries.inventory(jobs[read[-1]].documents),
        },
        "lengths": points,
        "effective_length": summaries.effective_length(by_length, settings.threshold, intervals),
        "perplexity": [
            summaries.perplexity(
                name,
                losses[name, length],
                jobs[name, length].documents,
                length,
                settings.stride if name == "sliding" else length,
                intervals,
            )
            for name, length in read
        ],
        "context": {
            "suffix": settings.suffix(),
            "points": summaries.context_points(by_context, intervals),
        }
        if by_context
        else None,
    }
