"""The engine against whole passes of the model: every kind of state, chunk, and number of rows."""

import pytest

from lcm.decoding import Engine

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


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_whole_passes(kind):
    model = tiny.model(*KINDS[kind])
    chunk, rows = SIZES.get(kind, (7, 2))
    engine = Engine(model, chunk=chunk, rows=rows)
    assert engine.rings == (kind in RINGS)
    # Of one kind, so long that caches grow while others are in flight.
    asked = requests(60 if kind == "rope" else 24)
    tiny.assert_model_says_so(model, asked, tiny.run(engine, asked))
