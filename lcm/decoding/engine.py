"""Continuous batching: rows of requests that come and go, prompts read in chunks between steps.

    read    one chunk of the next prompts; short ones lie in one row, as segments of it
    write   one token of every row that has a request

in turns, so that no request waits for a long prompt of another. A prompt's last token is read by
the first step, which makes prefill a program without logits (chunked prefill: Agrawal et al.,
arXiv:2308.16369; packing: Zhao et al., arXiv:2404.09529; batching: Yu et al., OSDI 2022).
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm import models, nn
from lcm.data.tokenizers import Tokenizer
from lcm.decoding import programs
from lcm.decoding.history import begin
from lcm.decoding.pages import Pool, pages_of
from lcm.decoding.processors import chain
from lcm.decoding.programs import Rows
from lcm.decoding.requests import Event, Request, check_ids
from lcm.decoding.sampling import keys
from lcm.decoding.settings import Plan, plan
from lcm.decoding.text import TextStream
from lcm.decoding.weights import WEIGHTS, laid_out
from lcm.errors import UserError
from lcm.models import State, decoder
from lcm.nn import PagedKVCache
from lcm.nn.spec import LATENT
from lcm.ops.attention.decode import paged
from lcm.types import Context

LEAST = 64  # tokens; sizes are powers of two from here on, a program for each
PAGE = 128  # tokens


class Engine:
    """One model's parameters, laid out for decoding, and the sizes of what it runs.

    rows: requests at a time, at the most.
    chunk: tokens of prompts read between two steps, at the most.
    cache: "contiguous", or "paged", where rows take no more memory than their requests need.
    cache_dtype: of keys and values; "int8" has a scale per token and head.
    pages: of a paged cache, `PAGE` tokens each; 0 has them for the `rows` largest requests.
    weights: "bfloat16" or "int8" has matrices in it; see `lcm.decoding.weights`.
    release: gives the model's own parameters up, so that memory holds them once.
    """

    def __init__(
        self,
        model: Any,
        *,
        rows: int = 8,
        chunk: int = 2048,
        cache: str = "contiguous",
        cache_dtype: str = "",
        pages: int = 0,
        weights: str = "",
        release: bool = False,
    ) -> None:
        for name, value, least in (("rows", rows, 1), ("chunk", chunk, 1), ("pages", pages, 0)):
            if value < least:
                raise UserError(f"{name}={value} must be at least {least}")
        _one_of("cache", cache, ("contiguous", "paged"))
        _one_of("weights", weights, WEIGHTS)
        _one_of("cache_dtype", cache_dtype, ("", "float32", "bfloat16", "int8"))
        self.spec, self.tokenizer = models.spec(model.cfg), model.tokenizer
        models.check_backend(self.spec)
        self.params = laid_out(model.params, weights, release)
        self.rows, self.chunk, self.cache, self.pages = rows, chunk, cache, pages
        self.cache_dtype = cache_dtype or self.spec.dtype
        if cache == "paged" and not self.whole:
            raise UserError(
                "cache=paged keeps every token, a layer of this model keeps a window or a "
                "recurrent state: take cache=contiguous, which keeps that alone"
            )
        if cache == "paged" and any(layer.mixer == LATENT for layer in self.spec.layers):
            raise UserError(
                "cache=paged has keys and values of one size, of which a layer of "
                "latent_attention keeps none: take cache=contiguous, which holds its latents"
            )

    @functools.cached_property
    def whole(self) -> bool:
        """Whether every layer keeps every token, so that some of them can be taken out."""
        return all(map(nn.whole, self.spec.layers))

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """The tokens of all requests, as they come; those of one request in their order.

        Raises:
            UserError: for a request that the model or the pool has no room for.
        """
        requests = list(requests)
        if not requests:
            return
        batch = Batch(self, requests)
        while batch.busy:
            batch.read()
            yield from batch.write()

    def text(self, request: Request) -> TextStream:
        """What its tokens become."""
        return TextStream(self.tokenizer or _NoText(), request.stop)

    @property
    def packs(self) -> bool:
        """Whether several prompts may be read in one row: not where the last ones push out the
        first."""
        return self.whole

    def state(self, rows: int, slots: int) -> State:
        """An empty state whose layers lie apart."""
        return _empty(self.spec, rows, slots, jnp.dtype(self.cache_dtype), self.chunk)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty(spec: models.ModelSpec, rows: int, slots: int, dtype: jnp.dtype, chunk: int) -> State:
    state = decoder.init_state(spec, rows, slots, dtype, chunk)
    return State(state.used_B, tuple(map(decoder.unstacked, state.layers)))


def check(spec: models.ModelSpec, tokenizer: Tokenizer | None, request: Request) -> None:
    """Refuses a request that no engine of the model could serve.

    Raises:
        UserError: for more tokens than the model has places for, ids that it has not, settings that
            leave nothing to draw, and stop strings that are empty or of a model without text.
    """
    models.check_limit(spec, request.tokens)
    check_ids(request.prompt, spec.vocab)
    plan([request.sampling], spec.vocab, request.tokens)
    if tokenizer is None and request.stop:
        raise UserError(f"stop={request.stop} cannot be found without a tokenizer: use stop_ids")
    TextStream(tokenizer or _NoText(), request.stop)


def bucket(tokens: int) -> int:
    """The size of program that so many tokens run in, and the slots of a row for them."""
    return max(LEAST, 1 << (tokens - 1).bit_length())


class Reader:
    """Prompts that are read together: one row of them, packed, and the state that it leaves.

    Requests with the same prompt, such as several samples of one, read it once.

    requests: by their numbers.
    begun: a state of one row and how many tokens of the only prompt it has read.
    places: for each request its number, the slot where its prompt begins, and its tokens.
    """

    def __init__(
        self,
        engine: Engine,
        requests: dict[int, Request] | list[Request],
        begun: tuple[State, int] | None = None,
    ) -> None:
        numbered = requests if isinstance(requests, dict) else dict(enumerate(requests))
        begins: dict[bytes, int] = {}
        packed: list[np.ndarray] = []
        self.places: list[tuple[int, int, int]] = []
        for number, request in numbered.items():
            key = request.prompt.tobytes()
            if key not in begins:
                begins[key] = sum(map(len, packed))
                packed.append(request.prompt[:-1])
            self.places.append((number, begins[key], request.read))
        self._tokens = np.concatenate(packed)
        positions = np.concatenate([np.arange(len(p), dtype=np.int32) for p in packed])
        segments = np.repeat(np.arange(1, len(packed) + 1, dtype=np.int32), [*map(len, packed)])
        self._context = Context(positions, segments, np.full_like(positions, -1))
        slots = bucket(max(len(self._tokens), 1))
        self._engine, self._read = engine, 0
        self.state = engine.state(1, slots) if begun is None else None
        if begun is not None:
            state, self._read = begun
            self.state = programs.first(state, self._read, slots)

    @property
    def done(self) -> bool:
        """Whether all prompts have been read."""
        return self._read == len(self._tokens)

    def read(self) -> None:
        """The next chunk."""
        engine, start = self._engine, self._read
        self._read = min(start + engine.chunk, len(self._tokens))
        count = self._read - start
        missing = min(bucket(count), engine.chunk) - count  # one of few sizes, a ring takes no more
        part = lambda x: np.pad(x[start : self._read], (0, missing))[None]  # noqa: E731
        context = jax.tree.map(part, self._context)
        tokens = part(self._tokens)
        self.state = programs.prefill(engine.spec, engine.params, self.state, tokens, context)


class _NoText:
    """Tokens of a model without a tokenizer: no text."""

    def token_bytes(self, token: int) -> bytes:
        return b""

    def decode(self, ids: Sequence[int]) -> str:
        return ""


@dataclasses.dataclass
class _Row:
    """What the host knows of the request in a row."""

    request: int
    text: TextStream
    count: int = 0


class Batch:
    """The rows of one run."""

    def __init__(
        self, engine: Engine, requests: list[Request], begun: tuple[State, int] | None = None
    ) -> None:
        for request in requests:
            check(engine.spec, engine.tokenizer, request)
        self.engine, self.requests = engine, requests
        self.waiting = collections.deque(range(len(requests)))
        longest = max(request.tokens for request in requests)
        settings = [request.sampling for request in requests]
        self.plan: Plan = plan(settings, engine.spec.vocab, longest)
        self.pool: Pool | None = None
        self.rows: list[_Row | None] = [None] * min(engine.rows, len(requests))
        self.reader: Reader | None = None
        if begun is not None:
            self.reader = Reader(engine, {self.waiting.popleft(): requests[0]}, begun)
        if engine.cache == "paged":
            self.pool = self._pool()
        self.device = self._none()
        # A ring must be one from the beginning; other caches grow as they have to.
        self.slots = bucket(requests[0].tokens if engine.whole else longest)
        self.state = self._state()

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.waiting) or self.reader is not None or any(self.rows)

    def read(self) -> None:
        """One chunk of prompts; with the last one their requests come into rows."""
        free = [row for row, own in enumerate(self.rows) if own is None]
        if self.reader is None:
            self.reader = self._next(len(free))
        reader = self.reader
        if reader is None:
            return
        if not reader.done:
            reader.read()
        if reader.done:
            for row, place in zip(free, reader.places, strict=False):
                self._admit(row, reader.state, *place)
            self.reader = None

    def write(self) -> Iterator[Event]:
        """One token of every row that has a request."""
        if not any(self.rows):
            return
        engine = self.engine
        self.state, self.device, drawn = programs.step(
            engine.spec, engine.params, self.state, self.device
        )
        tokens, logprobs, raw = (x.tolist() for x in jax.device_get(drawn))
        for at, row in enumerate(self.rows):
            if row is None:
                continue
            text, finish = self._told(row, tokens[at])
            if finish:
                self._release(at)
            yield Event(row.request, tokens[at], logprobs[at], raw[at], text, finish)

    def _told(self, row: _Row, token: int) -> tuple[str, str]:
        """What a token adds to the text of its row, and whether it ends it."""
        sampling = self.requests[row.request].sampling
        row.count += 1
        ended = token in sampling.stop_ids
        text = "" if ended else row.text.push(token)
        finish = "stop" if ended or row.text.stopped else ""
        if not finish and row.count == sampling.max_new_tokens:
            finish = "length"
        return (text + row.text.finish() if finish else text), finish

    def _next(self, most: int) -> Reader | None:
        """The next prompts: as many as there are rows and pages for, and fit one chunk."""
        taken: dict[int, Request] = {}
        prompts: dict[bytes, int] = {}
        pages = self.pool.free if self.pool else 0
        while self.waiting and len(taken) < most:
            request = self.requests[self.waiting[0]]
            prompts[request.prompt.tobytes()] = request.read
            pages -= self.pool.needs(request.tokens) if self.pool else 0
            short = self.engine.packs and sum(prompts.values()) <= self.engine.chunk
            if not (len(prompts) == 1 or short) or pages < 0:
                break
            taken[self.waiting.popleft()] = request
        return Reader(self.engine, taken) if taken else None

    def _admit(self, row: int, state: State, number: int, start: int, count: int) -> None:
        """A request whose prompt has been read, in a free row."""
        request = self.requests[number]
        self._grow(request.tokens)
        if self.pool is not None:
            self.pool.take(row, request.tokens)
            self._give_table()
        one, prompts = [request.sampling], [request.prompt]
        new = Rows(
            jnp.asarray(request.prompt[-1:]),
            jnp.ones(1, bool),
            chain(one, self.plan),
            keys(one, self.plan),
            begin(one, prompts, self.plan),
        )
        self.state, self.device = programs.take_over(
            self.state, self.device, row, state, start, count, new
        )
        self.rows[row] = _Row(number, self.engine.text(request))

    def _release(self, row: int) -> None:
        self.rows[row] = None
        self.device = programs.release(self.device, row)
        if self.pool is not None:
            self.pool.release(row)

    def _none(self) -> Rows:
        """Rows without a request, of the shapes that requests will have."""
        count, first = len(self.rows), self.requests[0].sampling
        settings = [first] * count
        return Rows(
            jnp.zeros(count, jnp.int32),
            jnp.zeros(count, bool),
            chain(settings, self.plan),
            keys(settings, self.plan),
            begin(settings, [self.requests[0].prompt[:1]] * count, self.plan),
        )

    def _grow(self, tokens: int) -> None:
        """Room for a row of so many tokens."""
        if tokens <= self.slots:
            return
        self.slots = bucket(tokens)
        if self.pool is not None:
            self.pool.widen(self.slots)
            return
        layers = decoder.over_layers(lambda x: x.longer(self.slots), self.state.layers)
        self.state = self.state._replace(layers=layers)

    def _state(self) -> State:
        """The empty state of all rows."""
        if self.pool is None:
            return self.engine.state(len(self.rows), self.slots)
        spec, pages = self.engine.spec, self.pool.free
        self.pool.widen(self.slots)

        def one(layer: Any) -> PagedKVCache:
            sizes = layer.kv_heads, layer.head_size, jnp.dtype(self.engine.cache_dtype)
            return PagedKVCache(paged(self.pool.table_RN, pages, *sizes, self.pool.page))

        counted = enumerate(spec.layers)
        layers = tuple([one(layer) for _ in range(spec.count(i))] for i, layer in counted)
        return State(jnp.zeros(len(self.rows), jnp.int32), layers)

    def _pool(self) -> Pool:
        """Pages for as many of the largest requests as there are rows, or as many as are given."""
        rows, given = len(self.rows), self.engine.pages
        sizes = sorted((pages_of(r.tokens, PAGE) for r in self.requests), reverse=True)
        if given and sizes[0] > given:
            raise UserError(
                f"a request of {max(r.tokens for r in self.requests)} tokens needs {sizes[0]} "
                f"pages of {PAGE}, there are {given}: raise pages, or lower max_new_tokens"
            )
        return Pool(given or sum(sizes[:rows]), rows, PAGE)

    def _give_table(self) -> None:
        """The table of pages to every layer."""
        table_RN = jnp.array(self.pool.table_RN)  # a copy, as the pool writes in its own
        give = lambda x: x.with_table(table_RN + 0)  # noqa: E731, an array each, to give away
        self.state = self.state._replace(layers=decoder.over_layers(give, self.state.layers))


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        known = ", ".join(choice or "'' (as the model)" for choice in choices)
        raise UserError(f"{name}={value!r} is unknown: choose from {known}")
