"""The engine against whole passes of the model: every kind of state, chunk, and number of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm.decoding import Engine, Request, Sampling, engine, programs
from lcm.decoding.engine import Batch, Reader
from lcm.errors import ConfigError, UserError

from . import tiny

KINDS = {
    "rope": [],
    "window": ["model.window=8"],
    "lm_infinite": [
        "model.positions=lm_infinite",
        "model.positions.window=9",
        "model.positions.sinks=3",
    ],
    "streaming_llm": ["model.positions=streaming_llm", "model.positions.kept=12"],
    "self_extend": [
        "model.positions=self_extend",
        "model.positions.group=4",
        "model.positions.window=8",
    ],
    "dual_chunk": ["model.positions=dual_chunk"],
    "yarn": ["model.positions=yarn", "model.positions.factor=4"],
    "dynamic_ntk": ["model.positions=dynamic_ntk", "model.positions.length=128"],
    "alibi": ["model.positions=alibi"],
    "learned": ["model.positions=learned", "model.positions.length=128"],
    "nope": ["model.positions=nope"],
    "chain": ["model.positions=head_scale+t5"],
    "pattern": [
        "model.depth=5",
        "model.pattern=attention,local,bare",
        "model.kinds.local.mixer=attention",
        "model.kinds.local.window=6",
        "model.kinds.bare.mixer=attention",
        "model.kinds.bare.positions=nope",
        "model.tied=False",
    ],
}
RINGS = ("window", "lm_infinite", "streaming_llm", "pattern")
# Tokens of a chunk, and rows; there are five requests.
SIZES = {"rope": (7, 2), "window": (4, 2), "lm_infinite": (1, 3), "streaming_llm": (7, 2)}
SIZES |= {"self_extend": (100, 3), "alibi": (1, 8), "pattern": (4, 3), "chain": (4, 5)}


def requests(longest: int = 24):
    """Prompts of one token up to more than a ring, generations that turn it several times."""
    return [
        tiny.request(5, 20),
        tiny.request(40, longest, seed=1, temperature=1.0),
        tiny.request(1, 12, seed=2, temperature=0.7),
        tiny.request(5, 9, temperature=1.0),
        tiny.request(17, 47, seed=4, temperature=1.0),
    ]


CASES = [
    pytest.param(kind, marks=pytest.mark.slow)
    if kind in ("window", "self_extend", "yarn", "nope", "learned", "chain", "dual_chunk")
    else kind
    for kind in KINDS
]


@pytest.mark.quick("rope", "lm_infinite")
@pytest.mark.parametrize("kind", CASES)
def test_tokens_are_those_of_whole_passes(kind):
    model = tiny.model(*KINDS[kind])
    chunk, rows = SIZES.get(kind, (7, 2))
    machine = Engine(model, chunk=chunk, rows=rows)
    assert machine.whole == (kind not in RINGS)
    # Of one kind, so long that caches grow while others are in flight.
    asked = requests(60 if kind == "rope" else 24)
    tiny.assert_model_says_so(model, asked, tiny.run(machine, asked))


@pytest.fixture
def small_pages(monkeypatch):
    monkeypatch.setattr(engine, "PAGE", 16)


def test_pages_hold_what_rows_do(small_pages):
    """Tables become wider as they have to, and pages go from one request to the next."""
    model, asked = tiny.model(), requests(60)
    machine = Engine(model, rows=2, chunk=16, cache="paged", pages=9)
    tiny.assert_model_says_so(model, asked, tiny.run(machine, asked))


def test_int8_caches_differ_by_their_rounding(small_pages):
    """Measured: by 0.083 nats at the most, in rows and in pages alike."""
    model, asked = tiny.model(), requests()
    for cache in ("contiguous", "paged"):
        machine = Engine(model, rows=3, cache=cache, cache_dtype="int8")
        events = tiny.run(machine, asked)
        tiny.assert_model_says_so(model, asked, events, atol=0.1)
        with pytest.raises(AssertionError):
            tiny.assert_model_says_so(model, asked, events, atol=2e-3)


@pytest.fixture
def counted(monkeypatch):
    """Tokens of prompts that are read from now on, call by call."""
    counts, prefill = [], programs.prefill

    def counting(spec, params, state, tokens_BL, at):
        counts.append(int((at.segments_BL > 0).sum()))
        return prefill(spec, params, state, tokens_BL, at)

    monkeypatch.setattr(programs, "prefill", counting)
    return counts


def test_prompts_are_read_once_and_together(counted):
    machine = Engine(tiny.model(), rows=8, chunk=16)
    five = [tiny.request(n, 2, seed) for n, seed in [(6, 0), (9, 1), (6, 0), (1, 2), (30, 3)]]
    tiny.run(machine, five)
    assert counted == [5 + 8, 16, 13]  # the third is the first, the fourth has nothing to read
    counted.clear()
    tiny.run(machine, [tiny.request(30, 2, 3)] * 3)
    assert counted == [16, 13]
    counted.clear()
    tiny.run(Engine(tiny.model(*KINDS["streaming_llm"]), chunk=16), [tiny.request(30, 2, 3)] * 3)
    assert counted == [16, 13]


def state_of(machine, requests):
    """The state of rows that have read these prompts, and its logits behind their last tokens."""
    reader = Reader(machine, requests)
    while not reader.done:
        reader.read()
    state = machine.state(len(requests), 64)
    for row, (_, start, count) in enumerate(reader.places):
        state = programs.insert(state, row, reader.state, start, count)
    return state, behind(machine, jax.tree.map(jnp.copy, state), requests)


def behind(machine, state, requests):
    last = jnp.asarray([request.prompt[-1] for request in requests])
    return programs.logits(machine.spec, machine.params, state, last, jnp.ones(len(last), bool))[1]


def held(layer, row: int, count: int):
    """Keys, values and places of a row's tokens."""
    assert int(layer.used_B[row]) == count
    assert layer.segments_BS[row].tolist() == [1] * count + [0] * (layer.slots - count)
    return (x[row, ..., :count, :] for x in (layer.k_BGSK, layer.v_BGSK)), layer.positions_BS[
        row, :count
    ]


@pytest.mark.parametrize("kind", ["rope", "alibi"])
def test_packed_chunked_and_alone_are_one(kind):
    """Logits and every row's cache; and one token after the other, by steps."""
    model = tiny.model(*KINDS[kind])
    three = [tiny.request(n, 2, seed) for seed, n in enumerate((9, 1, 21))]
    whole = Engine(model)
    packed, wanted = state_of(whole, three)
    others = [state_of(Engine(model, chunk=7), [request]) for request in three]
    for row, (request, (alone, logits)) in enumerate(zip(three, others, strict=True)):
        np.testing.assert_allclose(logits[0], wanted[row], atol=1e-5)
        for kinds, own in zip(packed.layers, alone.layers, strict=True):
            for layer, other in zip(kinds, own, strict=True):
                (numbers, places), (theirs, at) = (
                    held(layer, row, request.read),
                    held(other, 0, request.read),
                )
                np.testing.assert_array_equal(places, at)
                for x, y in zip(numbers, theirs, strict=True):
                    np.testing.assert_allclose(x, y, atol=1e-5)
    state = whole.state(3, 64)
    for n in range(20):
        token = jnp.asarray([r.prompt[min(n, r.read)] for r in three])
        active = jnp.asarray([n < r.read for r in three])
        state, _ = programs.logits(whole.spec, whole.params, state, token, active)
    np.testing.assert_allclose(behind(whole, state, three), wanted, atol=1e-5)


def test_a_row_without_a_request_stays_as_it_is():
    machine = Engine(tiny.model())
    batch = Batch(machine, [tiny.request(4, 3), tiny.request(9, 9, 1)])
    while batch.rows[0] is not None or batch.waiting:
        batch.read()
        list(batch.write())
    before = jax.tree.map(np.asarray, (batch.state, batch.device.token_R, batch.device.history))
    list(batch.write())
    after = jax.tree.map(np.asarray, (batch.state, batch.device.token_R, batch.device.history))

    def same(x, y):
        np.testing.assert_array_equal(x[0], y[0])

    jax.tree.map(same, before, after)
    assert before[0].used_B[1] + 1 == after[0].used_B[1]


MIXED = [
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 2},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.0},
    {"temperature": 0.5, "repetition_penalty": 1.5, "repetition_window": 4},
    {"temperature": 2.0, "top_k": 5, "no_repeat_ngram": 2, "seed": 7},
    {"temperature": 1.5, "min_new_tokens": 6, "stop_ids": tuple(range(0, 40, 2)), "seed": 8},
]


def test_neighbours_rows_and_order_change_no_token():
    """Three samples of a prompt and processors with memory, each with its own settings."""
    prompts = [tiny.tokens(max(i, 3), max(i, 3)) for i in range(7)]  # three of one, four of others
    settings = [Sampling(max_new_tokens=14, **each) for each in MIXED]
    asked = [Request(*each) for each in zip(prompts, settings, strict=True)]
    machine = Engine(tiny.model(), rows=8)
    wanted = tiny.written(tiny.run(machine, asked))
    assert len({*map(tuple, wanted[:3])}) == 3 and 6 <= len(wanted[6]) < 14
    pairs = [*zip(wanted[5], wanted[5][1:], strict=False)]
    assert len(pairs) == len({*pairs})
    order = [4, 6, 0, 3, 5, 1, 2]
    few = Engine(tiny.model(), rows=2, chunk=5)
    found = tiny.written(tiny.run(few, [asked[i] for i in order]))
    assert found == [wanted[i] for i in order]
    for i in (1, 5):
        assert tiny.written(tiny.run(machine, [asked[i]])) == [wanted[i]]


def test_no_page_is_lost_or_shared(small_pages):
    random = np.random.default_rng(0)
    asked = [tiny.request(*random.integers(1, (40, 5)), seed) for seed in range(300)]
    machine = Engine(tiny.model(), rows=4, cache="paged", pages=7)
    batch, seen = Batch(machine, asked), [0] * 300
    tokens = [[] for _ in asked]
    while batch.busy:
        batch.read()
        pages = batch.pool.table_RN[batch.pool.table_RN >= 0].tolist()
        assert len({*pages}) == len(pages) == 7 - batch.pool.free
        for event in batch.write():
            seen[event.request] += 1
            tokens[event.request].append(event.token)
    assert seen == [request.sampling.max_new_tokens for request in asked]
    assert batch.pool.free == 7 and (batch.pool.table_RN == -1).all()
    last = asked[-10:]
    assert tokens[-10:] == tiny.written(tiny.run(Engine(tiny.model()), last))


NEVER = {
    "pool": ({"cache": "paged", "pages": 2}, tiny.request(20, 20), "40 tokens needs 3 pages of 16"),
    "stop ids": ({}, tiny.request(2, 2, stop_ids=(40,)), "stop_ids=40 must be below the 40"),
    "banned": ({}, tiny.request(2, 2, banned=range(40)), "leave none of 40 tokens: ban fewer"),
    "ids": ({}, Request(np.array([3, 40])), "token 40: ids of this model are 0 to 39"),
    "negative": ({}, Request(np.array([3, -1])), "token -1: ids of this model are 0 to 39"),
    "stop": ({}, Request(tiny.tokens(2), stop=("a",)), "cannot be found without a tokenizer"),
}


@pytest.mark.parametrize("name", NEVER)
def test_requests_that_cannot_be_served(name, small_pages, monkeypatch):
    options, request, says = NEVER[name]
    monkeypatch.setattr(programs, "prefill", None)
    monkeypatch.setattr(programs, "step", None)
    with pytest.raises(UserError, match=says) as error:
        list(Engine(tiny.model(), **options).run([tiny.request(2, 2), request]))
    assert "\n" not in str(error.value)


def test_more_tokens_than_a_learned_table_has_places():
    model = tiny.model("model.positions=learned", "model.positions.length=64")
    with pytest.raises(ConfigError, match="length 65 does not fit the learned table of 64"):
        list(Engine(model).run([tiny.request(33, 32)]))


OPTIONS = {
    "rows": ({"rows": 0}, "rows=0 must be at least 1"),
    "chunk": ({"chunk": 0}, "chunk=0 must be at least 1"),
    "pages": ({"pages": -1}, "pages=-1 must be at least 0"),
    "cache": ({"cache": "ring"}, "cache='ring' is unknown: choose from contiguous, paged"),
    "dtype": ({"cache_dtype": "int4"}, "cache_dtype='int4' is unknown"),
    "weights": ({"weights": "int4"}, "weights='int4' is unknown: choose from"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_engines_that_cannot_be(name):
    options, says = OPTIONS[name]
    with pytest.raises(UserError, match=says):
        Engine(tiny.model(), **options)


def test_pages_keep_no_window():
    with pytest.raises(UserError, match="take cache=contiguous"):
        Engine(tiny.model("model.window=8"), cache="paged")


def test_nothing_to_do():
    assert list(Engine(tiny.model()).run([])) == []


@pytest.mark.parametrize("prompt", [[], [[1]], [1.0], 3, ["a"]])
def test_prompts_that_are_no_ids(prompt):
    with pytest.raises(UserError, match="a prompt of"):
        Request(np.asarray(prompt))
