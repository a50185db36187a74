"""Passkey retrieval (Mohtashami and Jaggi, 2023, arXiv:2305.16300): a number among idle sentences.

The prompt is theirs. Three things differ, so that figures of one length and depth compare: prompt
and answer fill a number of *tokens*, the key stands at a chosen *depth*, and it has five digits
(10000 to 99999; theirs is drawn from 1 to 50000). A key is retrieved if the first number that
greedy decoding writes is the key; beside that, the mean log-probability of the key's own tokens
tells how far from it a model is that fails.
"""

import pathlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm import models
from lcm.data.tokenizers import Tokenizer
from lcm.decoding.engine import Batch, Engine, Reader, bucket
from lcm.decoding.programs import first
from lcm.decoding.requests import Request
from lcm.decoding.settings import Sampling
from lcm.errors import UserError
from lcm.evaluation.likelihood import of_tokens
from lcm.evaluation.memory import identity
from lcm.evaluation.model import about
from lcm.evaluation.results import PASSKEY, SCHEMA, load, save
from lcm.models import ModelSpec, State, decoder
from lcm.pretrained import Model
from lcm.progress import progress
from lcm.types import Array, Context, Tokens

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
NEW_TOKENS = 10
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


class Trial(NamedTuple):
    """One question: `tokens` of prompt and answer at the most, the share of filler before the key,
    and a number that tells trials of one length and depth apart."""

    length: int
    depth: float
    seed: int

    @property
    def key(self) -> int:
        """The number to retrieve, of this trial's own."""
        entropy = [self.seed, self.length, round(1000 * self.depth)]
        return int(np.random.default_rng(entropy).integers(10_000, 100_000))


def prompt(trial: Trial, tokenizer: Tokenizer) -> str:
    """The longest prompt that leaves room for an answer within the trial's length.

    Raises:
        UserError: if the length does not hold the question alone.
    """
    size = lambda count: NEW_TOKENS + len(_encoded(text(trial, count), tokenizer))  # noqa: E731
    low, high = 0, trial.length
    if size(low) > trial.length:
        raise UserError(
            f"a passkey prompt of {trial.length} tokens has no room for filler: give lengths of "
            f"{size(low)} or more"
        )
    while low < high:  # as many sentences as fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= trial.length else (low, middle - 1)
    return text(trial, low)


def text(trial: Trial, sentences: int) -> str:
    """The prompt with so many sentences of filler; after the key they begin anew."""
    before = round(trial.depth * sentences)
    filler = lambda count: " ".join(FILLER[i % len(FILLER)] for i in range(count))  # noqa: E731
    needle = NEEDLE.format(key=trial.key)
    return "\n".join([TASK, filler(before), needle, filler(sentences - before), QUESTION])


def found(written: str, key: int) -> bool:
    """Whether the first number in a text is the key."""
    number = re.search(r"\d+", written)
    return number is not None and int(number[0]) == key


def answer(
    engine: Engine, trial: Trial, advance: Callable[[int], None] = lambda tokens: None
) -> dict[str, Any]:
    """What the model writes, and how likely it finds the key, after one reading of the prompt.

    `advance` is told the tokens that were read since it was called last.
    """
    tokenizer = engine.tokenizer
    asked = prompt(trial, tokenizer)
    ids = _encoded(asked, tokenizer)
    key = _encoded(f"{asked} {trial.key}", tokenizer)[len(ids) :]
    sampling = Sampling(temperature=0.0, max_new_tokens=NEW_TOKENS, stop_ids=tokenizer.stops)
    request = Request(ids, sampling)
    state = _read(engine, request, advance)
    given = np.concatenate([ids[-1:], key[:-1]])[None]
    logprobs = np.asarray(_given(engine.spec, engine.params, state, given, key))
    batch, written = Batch(engine, [request], (state, request.read)), ""
    while batch.busy:
        batch.read()
        written += "".join(event.text for event in batch.write())
    return {
        **trial._asdict(),
        "tokens": len(ids),
        "key": trial.key,
        "written": written,
        "found": found(written, trial.key),
        "logprob": float(logprobs.mean(dtype=np.float64)),
    }


def retrieve(
    model: Model,
    lengths: Sequence[int],
    *,
    file: pathlib.Path,
    depths: Sequence[float] = DEPTHS,
    count: int = 1,
    title: str = "passkey",
) -> dict[str, Any]:
    """Answers at each length and depth, `count` of them each; those that `file` has are kept.

    Raises:
        UserError: for lengths that hold no question or do not fit the model.
    """
    trials = [Trial(n, d, seed) for n in lengths for d in depths for seed in range(count)]
    models.check_limit(models.spec(model.cfg), max(lengths))
    for length in lengths:
        prompt(Trial(length, 0.0, 0), model.tokenizer)  # refused before anything is computed
    result = _begun(model, file)
    there = {(t["length"], t["depth"], t["seed"]) for t in result["trials"]}
    todo = [trial for trial in trials if trial not in there]
    engine, total, done = Engine(model, rows=1), sum(trial.length for trial in todo), 0
    with progress(title) as report:

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            hits = sum(trial["found"] for trial in result["trials"])
            report(done, total, f"{hits} of {len(result['trials'])} keys")

        for trial in todo:
            read = done
            advance(0)
            result["trials"].append(answer(engine, trial, advance))
            result["trials"].sort(key=lambda t: (t["length"], t["depth"], t["seed"]))
            save(result, file)
            advance(read + trial.length - done)
    return result


def grid(result: dict[str, Any], value: Callable[[dict], float]) -> dict[int, dict[float, float]]:
    """The mean of something over the trials of each length and depth."""
    cells: dict[int, dict[float, list[float]]] = {}
    for trial in result["trials"]:
        row = cells.setdefault(trial["length"], {})
        row.setdefault(trial["depth"], []).append(float(value(trial)))
    return {n: {d: float(np.mean(each)) for d, each in row.items()} for n, row in cells.items()}


def summary(result: dict[str, Any]) -> str:
    """A table for a terminal: keys found and the mean log-probability, lengths by depths."""
    right, likely = grid(result, lambda t: t["found"]), grid(result, lambda t: t["logprob"])
    depths = sorted({depth for row in right.values() for depth in row})
    lines = ["Keys found (mean log-probability of their tokens) by length and depth", ""]
    lines.append(f"{'tokens':>8}" + "".join(f"{f'{depth:.0%}':>15}" for depth in depths))
    for length, row in right.items():
        cells = [f"{row[d]:.2f} ({likely[length][d]:.2f})" if d in row else "" for d in depths]
        lines.append(f"{length:>8,}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def _encoded(text: str, tokenizer: Tokenizer) -> np.ndarray:
    first = [tokenizer.bos] if tokenizer.add_bos else []
    return np.concatenate([first, tokenizer.encode(text)]).astype(np.int32)


def _read(engine: Engine, request: Request, advance: Callable[[int], None]) -> State:
    """The state after all of a prompt but its last token, with room for an answer."""
    reader = Reader(engine, [request])
    while not reader.done:
        reader.read()
        jax.block_until_ready(reader.state.used_B)
        advance(min(engine.chunk, request.read))
    return first(reader.state, request.read, bucket(request.tokens))


@partial(jax.jit, static_argnums=0)
def _given(spec: ModelSpec, params: Any, state: State, tokens_1N: Tokens, next_N: Array) -> Array:
    """Log-probability of each of the next tokens, after a state and those before them."""
    positions_1N = state.used_B[:, None] + jnp.arange(tokens_1N.shape[1])
    context = Context(positions_1N, jnp.ones_like(positions_1N), jnp.full_like(positions_1N, -1))
    x_1ND, _ = decoder.hidden(spec, params, tokens_1N, context, state)
    return of_tokens(spec, params, x_1ND[0], next_N)[0]


def _begun(model: Model, file: pathlib.Path) -> dict[str, Any]:
    """The result as far as it is there; anew if it is of another model."""
    own = identity(model)
    empty = {"schema": SCHEMA, "kind": PASSKEY, "about": about(model) | {"identity": own}}
    if not file.exists():
        return {**empty, "trials": []}
    result = load(file, PASSKEY)
    return result if result["about"].get("identity") == own else {**empty, "trials": []}
