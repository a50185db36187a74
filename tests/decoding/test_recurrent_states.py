"""The engine with states that hold no tokens: what it writes is what the whole model says."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import models
from lcm.decoding import Sampling
from lcm.decoding.engine import Engine
from lcm.decoding.requests import Request
from lcm.decoding.session import Session
from lcm.errors import UserError

SHAPES = {
    "mamba-2": ["model.pattern=mamba2", "model.mlp=none", "model.depth=1"],
    "several arrays": ["model.depth=2", "model.pattern=mamba1,slstm", "model.mlp=none"],
    "window": ["model.pattern=gla", "model.depth=2", "model.extension=window=6"],
    "griffin": [
        "model.depth=2",
        "model.pattern=rglru,local",
        "model.kinds.rglru.mixer=rglru",
        "model.kinds.local.mixer=attention",
        "model.kinds.local.window=5",
    ],
}
NEW, LENGTH = 6, 128
PROMPTS = [np.arange(n, dtype=np.int32) * 7 % 250 for n in (11, 1, 100, 11)]


@pytest.fixture(params=SHAPES, scope="module")
def model(request):
    from lcm import config

    cfg = config.override(config.shrink(config.base()), SHAPES[request.param])
    params = models.init(cfg, jax.random.key(0))
    return types.SimpleNamespace(cfg=cfg, params=params, tokenizer=None)


def naive(model, prompt, count=NEW):
    """Greedy tokens, the whole sequence anew for each."""
    tokens = list(prompt)
    for _ in range(count):
        row = jnp.asarray(tokens + [0] * (LENGTH - len(tokens)))[None]
        logits, _ = models.apply(model.cfg, model.params, row)
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def request(prompt, count=NEW):
    return Request(np.asarray(prompt, np.int32), Sampling(temperature=0, max_new_tokens=count))


def written(events):
    out = {}
    for event in events:
        out.setdefault(event.request, []).append(event.token)
    return [out[number] for number in sorted(out)]


@pytest.mark.quick("griffin")
def test_batches_are_the_naive_loop(model):
    """Prompts in chunks, of one token, twice the same; rows that are free and taken again."""
    engine = Engine(model, rows=2, chunk=8)
    assert not engine.packs
    got = written(engine.run([request(prompt) for prompt in PROMPTS]))
    assert got == [naive(model, prompt) for prompt in PROMPTS]


@pytest.mark.quick("griffin", "several arrays")
def test_a_session_goes_on_and_begins_anew_where_texts_part(model, monkeypatch):
    engine = Engine(model, rows=1, chunk=8)
    session, read = Session(engine), []
    from lcm.decoding import programs

    prefill = programs.prefill
    count = lambda *args: read.append(int((args[4].segments_BL > 0).sum())) or prefill(*args)  # noqa: E731
    monkeypatch.setattr(programs, "prefill", count)
    first = written(session.run(request(PROMPTS[2])))[0]  # longer than a ring
    assert first == naive(model, PROMPTS[2]) and sum(read) == 99
    longer = [*PROMPTS[2], *first, 3, 4]
    read.clear()
    assert written(session.run(request(longer)))[0] == naive(model, longer)
    assert sum(read) == 2  # the last token of the first text, and 3
    other = [*longer[:9], 8]
    read.clear()
    assert written(session.run(request(other)))[0] == naive(model, other)
    assert sum(read) == 9


def test_a_step_whose_token_was_never_told(model, monkeypatch):
    """The state has read a token that nobody knows of, so it is no use."""
    session = Session(Engine(model, rows=1, chunk=8))
    told = []

    def interrupted(drawn):
        told.append(drawn)
        if len(told) == 4:
            raise KeyboardInterrupt
        return device_get(drawn)

    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(session.run(request(PROMPTS[0])))
    monkeypatch.undo()
    longer = [*PROMPTS[0], *naive(model, PROMPTS[0])[:3], 5]
    assert written(session.run(request(longer)))[0] == naive(model, longer)


def test_what_it_cannot_do_is_refused(model):
    with pytest.raises(UserError, match="a window or a recurrent state"):
        Engine(model, cache="paged")
