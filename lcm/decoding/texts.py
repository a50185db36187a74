"""Texts from prompts: the functions most users call."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lcm.data.tokenizers import Tokenizer
from lcm.decoding.context import fitted
from lcm.decoding.engine import Engine
from lcm.decoding.requests import Event, Request, check_ids
from lcm.decoding.settings import Sampling
from lcm.errors import UserError
from lcm.pretrained import chat

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | np.ndarray | Messages
SEEDS = 1 << 32


class Generation(NamedTuple):
    """What became of a prompt.

    prompt: its number among those given.
    text: what was written, without the prompt, stop tokens and stop strings.
    tokens: all that was drawn, the stop token included.
    logprobs: of each token, under the distribution it was drawn from (0 where that is greedy).
    raw_logprobs: of each token, under the model's own.
    finish_reason: "stop" for a stop token or string, "length" for max_new_tokens.
    """

    prompt: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    raw_logprobs: tuple[float, ...]
    finish_reason: str

    @property
    def score(self) -> float:
        """The log-probability of the tokens under the model."""
        return sum(self.raw_logprobs)


def generate(
    model: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    n: int = 1,
    stop: Sequence[str] = (),
    full: str = "refuse",
    rows: int = 8,
    engine: dict[str, Any] | None = None,
    on_event: Callable[[Event], None] | None = None,
    **sampling: Any,
) -> list[Generation]:
    """Goes on with each prompt.

    Args:
        model: what `lcm.load` gives.
        prompts: a text, token ids, or the messages of a conversation; or a list of them. A text has
            the tokenizer's first token put before it where its model was trained so; messages,
            `[{"role": "user", "content": "..."}]`, are written out by the model's chat template;
            ids are taken as they are.
        n: texts for each prompt, with seeds `seed`, `seed + 1`, ...; the likeliest comes first.
        stop: strings that end a text.
        full: what to do about texts longer than the model was trained on; see `decoding.context`.
        rows: texts at a time.
        engine: further options of `Engine`.
        on_event: called with each token as it comes; its `request` counts from prompt to prompt,
            `n` for each.
        sampling: fields of `Sampling`, such as max_new_tokens=256 and temperature=1.0 (0 is
            greedy). Stop tokens are those of the tokenizer, if none are given.

    Returns:
        `n` generations for each prompt, in the order of the prompts. A text depends on its prompt,
        settings and seed, and not on what else is generated with it.

    Raises:
        UserError: for settings, or prompts, that cannot be.
    """
    if n < 1:
        raise UserError(f"n={n} must be at least 1 text for each prompt")
    settings = settings_of(model, sampling)
    requests = [
        dataclasses.replace(request, sampling=_seeded(request.sampling, i))
        for request in requests_of(model, listed(prompts), settings, stop)
        for i in range(n)
    ]
    events: list[list[Event]] = [[] for _ in requests]
    for event in run(model, requests, full=full, rows=rows, **(engine or {})):
        events[event.request].append(event)
        if on_event is not None:
            on_event(event)
    made = [_generation(number // n, own) for number, own in enumerate(events)]
    groups = [made[i : i + n] for i in range(0, len(made), n)]
    return [g for group in groups for g in sorted(group, key=lambda g: -g.score)]


def stream(
    model: Any,
    prompt: Prompt,
    *,
    stop: Sequence[str] = (),
    full: str = "refuse",
    engine: dict[str, Any] | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """The text that goes on a prompt, in pieces as they come; arguments as of `generate`."""
    requests = requests_of(model, [prompt], settings_of(model, sampling), stop)
    for event in run(model, requests, full=full, rows=1, **(engine or {})):
        if event.text:
            yield event.text


def run(
    model: Any, requests: Sequence[Request], *, full: str = "refuse", **engine: Any
) -> Iterator[Event]:
    """The events of requests, on an engine made for them."""
    if not requests:
        return
    longest = max(request.tokens for request in requests)
    yield from Engine(fitted(model, longest, full), **engine).run(requests)


def settings_of(model: Any, fields: dict[str, Any]) -> Sampling:
    """Sampling by the names of its fields, with the tokenizer's stop tokens where none are given.

    Raises:
        UserError: for an unknown name or a value that cannot be.
    """
    known = [field.name for field in dataclasses.fields(Sampling)]
    for name in fields:
        if name not in known:
            raise UserError(f"{name}={fields[name]!r} is no setting: those are {', '.join(known)}")
    stops = () if model.tokenizer is None else model.tokenizer.stops
    return Sampling(**{"stop_ids": stops, **fields})


def requests_of(
    model: Any, prompts: Sequence[Prompt], sampling: Sampling, stop: Sequence[str] = ()
) -> list[Request]:
    """One request for each prompt.

    Raises:
        UserError: for an empty prompt, ids that the model has not, or a text without a tokenizer.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    return [Request(_tokens(model, prompt, n), sampling, stop) for n, prompt in enumerate(prompts)]


def _tokens(model: Any, prompt: Prompt, number: int) -> np.ndarray:
    """A prompt as token ids."""
    if isinstance(prompt, str):
        ids = _read(_tokenizer(model), prompt)
    elif isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
        ids = conversation(model, prompt)
    else:
        ids = _array(prompt)
    if not ids.size:
        raise UserError(f"prompt {number} is empty: give it a word, or a token such as the bos")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"prompt {number} is {ids.dtype} {ids.shape}: give a text or a list of ids")
    check_ids(ids, model.cfg.model.vocab, f"prompt {number}")
    return ids


def _read(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """A text with the first token before it, where texts have one."""
    first = [tokenizer.bos] if tokenizer.add_bos else []
    try:
        return np.concatenate([first, tokenizer.encode(text)]).astype(np.int32)
    except UnicodeEncodeError as error:
        raise UserError(
            f"a prompt has half of a surrogate pair at character {error.start}, which is no text: "
            "take it out"
        ) from None


def _array(prompt: Any) -> np.ndarray:
    """An array, of objects where it can be no other."""
    try:
        return np.asarray(prompt)
    except ValueError:  # lists of different lengths
        return np.array([*prompt], object)


def conversation(model: Any, messages: Messages) -> np.ndarray:
    """Token ids of a conversation, up to where the assistant begins to speak.

    Raises:
        UserError: if the model has no chat template, or that refuses the messages.
    """
    return _tokenizer(model).encode(rendered(model, messages), special=True)


def rendered(model: Any, messages: Messages, **options: Any) -> str:
    """A conversation as the model's chat template writes it out; `options` are of `chat.render`.

    Raises:
        UserError: as `conversation` does.
    """
    tokenizer = _tokenizer(model)
    first, last = (tokenizer.decode([i], special=True) for i in (tokenizer.bos, tokenizer.eos))
    return chat.render(model.chat_template, messages, bos=first, eos=last, **options)


def _tokenizer(model: Any) -> Tokenizer:
    if model.tokenizer is None:
        raise UserError(
            "this model came without a tokenizer: give token ids, or put a tokenizer.json beside "
            "its weights"
        )
    return model.tokenizer


def listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Several prompts, or the one, which is a text, token ids or a conversation."""
    if isinstance(prompts, str):
        return [prompts]
    whole = len(prompts) and not isinstance(prompts[0], str) and not _array(prompts[0]).ndim
    return [prompts] if whole else list(prompts)


def _seeded(sampling: Sampling, number: int) -> Sampling:
    return dataclasses.replace(sampling, seed=(sampling.seed + number) % SEEDS)


def _generation(prompt: int, events: list[Event]) -> Generation:
    return Generation(
        prompt,
        "".join(event.text for event in events),
        tuple(event.token for event in events),
        tuple(event.logprob for event in events),
        tuple(event.raw_logprob for event in events),
        events[-1].finish,
    )
