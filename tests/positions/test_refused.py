"""What cannot work is refused with its numbers, from words of a command line to a model's spec."""

import pytest

from lcm import config, models, positions
from lcm.errors import ConfigError
from lcm.positions import Dims

# Overrides of a model of length 32, width 32 and heads of 16, and what the error must say.
REFUSED = {
    "factor": (["linear", "factor=0.5"], ["factor=0.5", "shorten", "1 or more"]),
    "factor of yarn": (["yarn", "factor=0.25"], ["factor=0.25", "1 or more"]),
    "factor of clex": (["clex", "factor=0"], ["factor=0", "1 or more"]),
    "fraction": (["rope", "fraction=1.5"], ["fraction=1.5", "at most 1"]),
    "odd share": (["rope", "fraction=0.2"], ["head_size=16", "fraction=0.2, 3, is odd", "even"]),
    "nothing rotated": (
        ["rope", "fraction=0.01"],
        ["fraction=0.01, 0, is nothing", "2 numbers or more"],
    ),
    "base": (["rope", "base=1"], ["base=1", "above 1", "10000"]),
    "base of a sinusoid": (["sinusoidal", "base=0.5"], ["base=0.5", "above 1"]),
    "unit": (["intervals", "unit=0"], ["unit=0", "above 0"]),
    "speeds": (
        ["intervals", "slowest=8", "fastest=2"],
        ["slowest=8", "fastest=2", "slowest first"],
    ),
    "base of a sandwich": (["sandwich", "base=1"], ["base=1", "above 1", "10000"]),
    "dims of a sandwich": (["sandwich", "dims=7"], ["dims=7", "even"]),
    "p": (["proportional", "p=1.2"], ["p=1.2", "between 0"]),
    "power": (["power", "k=-1"], ["k=-1", "0 or more"]),
    "turns": (["yarn", "beta_fast=0.5"], ["beta_slow=1", "beta_fast=0.5", "<"]),
    "bands": (["llama3", "alpha=8"], ["alpha=8", "beta=4", "<"]),
    "original": (["yarn", "original=-4"], ["original=-4", "1 or more"]),
    "original of a remap": (["lm_infinite", "original=-4"], ["original=-4", "1 or more"]),
    "longrope": (["longrope"], ["short has 0 factors", "needs 8"]),
    "longrope, short": (
        ["longrope", "short=(1.0,)", f"long={(1.0,) * 8}"],
        ["short has 1 factors", "needs 8", "head of 16"],
    ),
    "longrope, long": (
        ["longrope", f"short={(1.0,) * 8}", f"long={(1.0,) * 9}"],
        ["long has 9 factors", "needs 8"],
    ),
    "longrope, negative": (
        ["longrope", f"short={(1.0,) * 8}", f"long={(-1.0,) * 8}"],
        ["long has 8 factors, not all positive"],
    ),
    "rerope": (["rerope", "window=33"], ["window=33", "trained length 32"]),
    "rerope's default": (["rerope"], ["window=512", "trained length 32"]),
    "leaky": (["leaky_rerope", "window=8", "k=0.5"], ["k=0.5", "1 or more"]),
    "self_extend": (["self_extend", "window=64"], ["window=64", "trained length 32"]),
    "group": (["self_extend", "window=8", "group=0"], ["group=0", "at least 1"]),
    "dual_chunk": (["dual_chunk", "chunk=30", "local=8"], ["chunk=30", "local=8", "length 32"]),
    "dual_chunk, local": (["dual_chunk", "chunk=4", "local=8"], ["chunk=4", "local=8"]),
    "lm_infinite": (["lm_infinite", "window=64"], ["window=64", "cap=64", "length 32"]),
    "lm_infinite, cap": (["lm_infinite", "window=16", "cap=8"], ["window=16", "cap=8"]),
    "lm_infinite, sinks": (["lm_infinite", "sinks=0"], ["sinks=0", "at least 1", "model.window"]),
    "streaming": (["streaming_llm", "kept=64"], ["kept=64", "length 32"]),
    "streaming, sinks": (["streaming_llm", "sinks=32"], ["sinks=32", "kept=32"]),
    "reattention": (["reattention"], ["local=-4064", "chunk=512", "4096", "length 32"]),
    "learned": (["learned", "length=16"], ["length=16", "data.length=32", "to 32 or more"]),
    "learned, keep": (["learned", "keep=32"], ["keep=32", "rows of 32"]),
    "t5": (["t5", "buckets=7"], ["buckets=7", "even"]),
    "t5, farthest": (["t5", "farthest=16"], ["farthest=16", "32 buckets"]),
    "fire": (["fire", "threshold=0"], ["threshold=0", "above 0"]),
    "hard_alibi": (["hard_alibi", "local=3"], ["local=3", "model.heads=2"]),
    "cope": (["cope", "positions=1"], ["positions=1", "at least 2"]),
    "xpos": (["xpos", "scale_base=0"], ["scale_base=0", "above 0"]),
    "log_n": (["log_n", "original=1"], ["original=1", "2 or more"]),
    "scale": (["uniform_scale", "factor=0"], ["factor=0", "above 0"]),
    "floor": (["floor_scale", "floor=0"], ["floor=0", "at least 1"]),
    "temperature": (["aligned", "temperature=0"], ["temperature=0", "above 0"]),
    "chunk": (["chunked", "size=0"], ["size=0", "at least 1"]),
    "clex": (["clex", "activation=relu"], ["'relu'", "tanh, silu"]),
    "name": (["ropee"], ["'ropee' is unknown", "nope, learned"]),
    "field": (["rope", "factor=2"], ["model.positions.factor", "unknown"]),
    "order": (["rope+log_n"], ["RoPE", "put it last"]),
    "order, biases": (["alibi+rope"], ["ALiBi", "put it last"]),
    "order, remaps": (["dual_chunk+log_n"], ["DualChunk", "put it last"]),
    "order, cope": (["cope+nope"], ["CoPE", "put it last"]),
    "inside a chain": (["log_n+linear", "second.factor=0.5"], ["factor=0.5", "1 or more"]),
    "inside a remap": (
        ["rerope", "window=8", "rope=linear", "rope.factor=0.5"],
        ["factor=0.5", "1 or more"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_compiled(tiny, name):
    (encoding, *fields), says = REFUSED[name]
    words = [f"model.positions={encoding}", *(f"model.positions.{field}" for field in fields)]
    with pytest.raises(ConfigError) as error:
        models.spec(tiny(*words))
    for text in says:
        assert text in str(error.value), error.value


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_kind_of_layer_too(tiny, name):
    (encoding, *fields), says = REFUSED[name]
    key = "model.kinds.other.positions"
    words = [f"{key}={encoding}", *(f"{key}.{field}" for field in fields)]
    with pytest.raises(ConfigError) as error:
        models.spec(tiny("model.pattern=attention,other", *words))
    if name not in ("name", "field"):  # which say the whole key
        assert says[0] in str(error.value), error.value


def test_a_remap_of_what_does_not_rotate():
    """Set behind the constructor's back, whose types are checked in tests alone."""
    remap = positions.ReRoPE(window=8)
    object.__setattr__(remap, "rope", positions.ALiBi())
    with pytest.raises(ConfigError, match=r"rope is ALiBi, which has no rotation"):
        remap.check(Dims(width=32, heads=2, kv_heads=2, head_size=16, length=32))


def test_a_field_of_the_name_of_its_key(tiny):
    """CoPE's number of positions is a field of model.positions, not another encoding."""
    cfg = tiny("model.positions=cope", "model.positions.positions=9")
    assert models.spec(cfg).positions == positions.CoPE(positions=9)
    cfg = tiny("model.kinds.a.positions=cope", "model.kinds.a.positions.positions=9")
    assert cfg.model.kinds.a.positions.positions == 9


def test_odd_heads(tiny):
    for encoding in ("rope", "yarn", "xpos", "dual_chunk", "log_n+rope"):
        with pytest.raises(ConfigError, match=r"model.head_size=7 is odd: make it even"):
            models.spec(tiny(f"model.positions={encoding}", "model.head_size=7"))


@pytest.mark.parametrize(
    "encoding",
    [
        positions.YaRN(factor=2.0),
        positions.DynamicNTK(),
        positions.Llama3(),
        positions.TruncatedBasis(),
        positions.ByParts(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_trained_length_that_no_model_has_set(encoding):
    with pytest.raises(ValueError, match=rf"{type(encoding).__name__}\(original=0\).*set original"):
        encoding.frequencies(16)
    dims = Dims(width=32, heads=2, kv_heads=2, head_size=16, length=32)
    assert encoding.resolved(dims).original == 32


PLACEMENTS = {
    "randomised": (["randomised", "range=16"], ["range=16", "data.length=32", "64"]),
    "pose": (["pose", "factor=0"], ["factor=0", "at least 1"]),
    "cream": (["cream", "factor=8"], ["factor=8", "at least 66", "32"]),
    "segmented": (["segmented", "chunk=5"], ["chunk=5", "32 tokens", "divisor"]),
    "jittered": (["jittered", "unit=0"], ["unit=0", "at least 1"]),
    "name": (["posee"], ["'posee' is unknown", "plain, randomised"]),
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placements_that_cannot_work(tiny, name):
    (placement, *fields), says = PLACEMENTS[name]
    words = [f"train.placement={placement}", *(f"train.placement.{field}" for field in fields)]
    with pytest.raises(ConfigError) as error:
        cfg = tiny(*words)
        positions.make_placement(cfg.train.placement).check(cfg.data.length)
    for text in says:
        assert text in str(error.value), error.value


def test_good_neighbours_of_bad_input_are_taken(tiny):
    """So that the refusals above are of their values alone."""
    for words in (
        ["linear", "factor=1"],
        ["rope", "fraction=0.25"],
        ["longrope", f"short={(1.0,) * 8}", f"long={(2.0,) * 8}"],
        ["rerope", "window=32"],
        ["dual_chunk", "chunk=24", "local=8"],
        ["learned", "length=32"],
        ["t5", "farthest=17"],
        ["log_n+yarn", "second.factor=4"],
        ["rerope", "window=8", "rope=linear", "rope.factor=2"],
    ):
        encoding, *fields = words
        cfg = tiny(f"model.positions={encoding}", *(f"model.positions.{f}" for f in fields))
        models.spec(cfg)
    assert config.override(cfg, ["model.positions=nope"]).model.positions.name == "nope"
