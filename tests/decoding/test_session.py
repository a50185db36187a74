"""Conversations: what is reused gives the tokens of a fresh run, and is not read again."""

import numpy as np
import pytest

from lcm.decoding import Engine, Request, Sampling, Session, programs
from lcm.errors import UserError

from . import tiny
from .test_engine import KINDS, counted  # noqa: F401

GREEDY = Sampling(max_new_tokens=8, temperature=0.0)


def reply(session, prompt, **settings) -> list[int]:
    sampling = Sampling(**{"max_new_tokens": 8, "temperature": 0.0, **settings})
    return [event.token for event in session.run(Request(np.asarray(prompt), sampling))]


def fresh(engine, prompt, **settings) -> list[int]:
    return reply(Session(engine), prompt, **settings)


@pytest.fixture(scope="module", params=["rope", "int8", "self_extend"])
def engine(request):
    options = {"cache_dtype": "int8"} if request.param == "int8" else {}
    return Engine(tiny.model(*KINDS.get(request.param, [])), rows=1, **options)


@pytest.mark.quick("self_extend")
def test_only_what_is_new_is_read(engine, counted):  # noqa: F811
    session, begin = Session(engine), [*tiny.tokens(9)]
    first = reply(session, begin)
    assert counted == [8] and first == fresh(engine, begin)
    longer = [*begin, *first, *tiny.tokens(5, 1)]
    counted.clear()
    second = reply(session, longer)
    assert counted == [len(longer) - 1 - (9 + 7)]  # the last token of an answer has not been read
    assert second == fresh(engine, longer)
    grown = [*longer, *second, *tiny.tokens(30, 2)]  # into the next size of caches
    counted.clear()
    third = reply(session, grown, temperature=1.0, seed=3)
    assert counted == [len(grown) - 1 - (len(longer) + 7)]
    assert third == fresh(engine, grown, temperature=1.0, seed=3)


def test_a_history_that_was_edited(engine, counted):  # noqa: F811
    session, begin = Session(engine), [*tiny.tokens(20)]
    first = reply(session, begin)
    other = [*begin[:11], *tiny.tokens(7, 5)]
    assert other[11] != begin[11]
    counted.clear()
    assert reply(session, other) == fresh(engine, other)
    assert counted == [17 - 11, 17]
    # The same again, a beginning of it, and something else altogether.
    counted.clear()
    for prompt, read in ((other, 0), (other[:5], 0), ([*tiny.tokens(6, 9)], 5)):
        assert reply(session, prompt) == fresh(engine, prompt)
        assert sum(counted) - read == len(prompt) - 1
        counted.clear()
    assert reply(session, begin) == first


def test_an_answer_that_was_left_off(engine, counted):  # noqa: F811
    session, begin = Session(engine), [*tiny.tokens(9)]
    events, some = session.run(Request(np.asarray(begin), GREEDY)), []
    for event in events:
        some.append(event.token)
        if len(some) == 4:
            break
    events.close()
    after = [*begin, *some, *tiny.tokens(3, 4)]
    counted.clear()
    assert reply(session, after) == fresh(engine, after)
    assert counted == [len(after) - 1 - (9 + 3), len(after) - 1]


def test_a_step_that_was_interrupted(monkeypatch):
    """A state that a step has taken and not given back is not gone on with."""
    engine = Engine(tiny.model(), rows=1)
    session, begin, step = Session(engine), [*tiny.tokens(9)], programs.step
    calls = []

    def interrupted(*arguments):
        calls.append(step(*arguments))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(programs, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reply(session, begin)
    monkeypatch.undo()
    assert reply(session, begin) == fresh(engine, begin)


@pytest.mark.parametrize(
    ("kind", "options"), [("streaming_llm", {"chunk": 7}), ("rope", {"cache": "paged"})]
)
def test_what_cannot_go_back_reads_again(kind, options, counted):  # noqa: F811
    engine = Engine(tiny.model(*KINDS[kind]), rows=1, **options)
    session, begin = Session(engine), [*tiny.tokens(20)]
    other = [*begin, *reply(session, begin)[:-2], 3, 4]  # one that was read is another now
    counted.clear()
    assert reply(session, other) == fresh(engine, other)
    assert sum(counted) == 2 * (len(other) - 1)


@pytest.mark.parametrize(("cache", "read"), [("contiguous", 1), ("paged", 28)])
def test_a_ring_goes_on_and_pages_do_not(cache, read, counted):  # noqa: F811
    kind = "rope" if cache == "paged" else "streaming_llm"
    engine = Engine(tiny.model(*KINDS[kind]), rows=1, chunk=7, cache=cache)
    session, begin = Session(engine), [*tiny.tokens(20)]
    longer = [*begin, *reply(session, begin), 3]
    counted.clear()
    assert reply(session, longer) == fresh(engine, longer)
    assert sum(counted) == read + len(longer) - 1


def test_a_request_that_cannot_be_leaves_the_conversation(counted):  # noqa: F811
    session, begin = Session(Engine(tiny.model(), rows=1)), [*tiny.tokens(9)]
    answer = reply(session, begin)
    with pytest.raises(UserError, match="token 77: ids of this model are 0 to 39"):
        reply(session, [*begin, *answer, 77])
    counted.clear()
    reply(session, [*begin, *answer, 7])
    assert counted == [1]
