"""Encodings from and to Hugging Face configs, and their frequencies as transformers has them."""

import json

import jax.numpy as jnp
import make_golden
import numpy as np
import pytest
from hf_configs import CONFIGS, FACTORS, GEMMA, LLAMA, MULTIPLES, PHI, llama3, model, yarn

from lcm import models, positions
from lcm.errors import ConfigError
from lcm.positions import Chain, Layers, from_hf, to_hf

GOLDEN = json.loads(make_golden.FILE.read_text())


def chosen(name):
    """The encoding of the kind of layer that a case compares."""
    case = CONFIGS[name]
    found = from_hf(case.config)
    found = found.kinds[case.kind] if case.kind else found
    return found.second if isinstance(found, Chain) else found


def ours(name):
    rope, case = chosen(name), CONFIGS[name]
    return [rope.frequencies(case.size, jnp.asarray(m * case.trained)) for m in MULTIPLES]


@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_and_amplitudes_are_those_of_transformers(name):
    for row, (frequencies, factor) in enumerate(ours(name)):
        golden = GOLDEN[name][row if len(GOLDEN[name]) > 1 else 0]
        np.testing.assert_allclose(frequencies, golden["frequencies"], rtol=1e-6, atol=1e-6)
        assert float(factor) == pytest.approx(golden["factor"], rel=1e-6)


def test_golden_values_depend_on_length_where_they_should():
    """So lengths reached transformers: one row each for what does not depend on it."""
    assert GOLDEN.keys() - {"transformers"} == CONFIGS.keys()
    rows = {name: len(GOLDEN[name]) for name in CONFIGS}
    assert {name for name, n in rows.items() if n > 1} == {
        name for name in CONFIGS if "dynamic" in name or "Phi" in name or "Long" in name
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_live_transformers_agree(name):
    """With the release that is installed, which may be newer than the one of the file."""
    transformers = pytest.importorskip("transformers", reason="transformers: golden values only")
    pytest.importorskip("torch", reason="transformers computes frequencies with torch: golden only")
    transformers.logging.set_verbosity_error()
    for (frequencies, factor), live in zip(ours(name), make_golden.computed(name), strict=True):
        np.testing.assert_allclose(frequencies, live["frequencies"], rtol=1e-6, atol=1e-6)
        assert float(factor) == pytest.approx(live["factor"], rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_round_trip(name):
    found = from_hf(CONFIGS[name].config)
    written = json.loads(json.dumps(to_hf(found)))  # a config.json holds it
    assert from_hf(written) == found


ROPES = {
    "rope": positions.RoPE(base=5e5, fraction=0.5, interleaved=True),
    "linear": positions.Linear(base=1e6, factor=4.0),
    "dynamic": positions.DynamicNTK(factor=2.0, original=4096),
    "yarn": positions.YaRN(factor=4.0, original=64, beta_fast=8.0, truncate=False),
    "yarn, amplitude": positions.YaRN(factor=4.0, original=64, attention_factor=1.1),
    "yarn, mscale": positions.YaRN(factor=4.0, original=64, mscale=1.0, mscale_all_dim=0.5),
    "longrope": positions.LongRoPE(factor=4.0, original=64, short=(1.0, 1.5), long=(2.0, 4.0)),
    "llama3": positions.Llama3(original=8192, alpha=2.0),
    "proportional": positions.Proportional(p=0.25, factor=2.0),
    "nope": positions.NoPE(),
    "alibi": positions.ALiBi(),
    "t5": positions.T5(buckets=16, farthest=64),
    "learned": positions.Learned(length=77, std=0.01),
    "chunked": Chain(positions.Chunked(64), positions.RoPE(interleaved=True)),
    "floor_scale": Chain(positions.FloorScale(0.2, 64), positions.NoPE()),
}
LAYERS = {
    "nope in every fourth": Layers(
        {"rope": ROPES["yarn"], "nope": positions.NoPE()}, ("rope", "rope", "rope", "nope")
    ),
    "Llama 4": Layers(
        {"rope": ROPES["chunked"], "nope": ROPES["floor_scale"]}, ("rope", "rope", "nope")
    ),
    "types": Layers(
        {"sliding_attention": positions.RoPE(), "full_attention": ROPES["linear"]},
        ("sliding_attention", "sliding_attention", "full_attention"),
    ),
    "types, one without": Layers(
        {"a": ROPES["llama3"], "b": positions.NoPE(), "c": ROPES["proportional"]}, ("a", "b", "c")
    ),
}


@pytest.mark.parametrize("name", [*ROPES, *LAYERS])
def test_encodings_round_trip(name):
    given = ROPES.get(name) or LAYERS[name]
    assert from_hf(json.loads(json.dumps(to_hf(given)))) == given
    assert from_hf(to_hf(given, depth=24)) == given


SCALED = [n for n, e in ROPES.items() if isinstance(e, positions.RoPE) and n != "rope"]


@pytest.mark.parametrize("name", SCALED)  # the default one, each model computes for itself
def test_rope_forms_are_read_by_transformers(name):
    """What `to_hf` writes gives transformers the frequencies that it gives us."""
    pytest.importorskip("torch", reason="transformers computes frequencies with torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    transformers.logging.set_verbosity_error()
    written = {**LLAMA, **to_hf(ROPES[name]), "head_dim": 4}
    config = transformers.LlamaConfig(**json.loads(json.dumps(written)))
    for length in (64, 5000):
        function = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
        theirs, amplitude = function(config, seq_len=length)
        frequencies, factor = ROPES[name].frequencies(4, jnp.asarray(length))
        np.testing.assert_allclose(frequencies, theirs, rtol=1e-6, atol=1e-6)
        assert float(factor) == pytest.approx(amplitude, rel=1e-6)


def test_models_by_their_type():
    assert from_hf({"model_type": "bloom", "n_head": 32}) == positions.ALiBi()
    mpt = {"model_type": "mpt", "max_seq_len": 2048, "n_layers": 32}
    assert from_hf({**mpt, "attn_config": {"alibi": True}}) == positions.ALiBi()
    assert from_hf({**mpt, "attn_config": {"alibi": False}}) == positions.Learned(2048)
    assert from_hf({"model_type": "gpt2", "n_positions": 512}) == positions.Learned(512)
    assert from_hf({"model_type": "falcon", "alibi": False}) == positions.RoPE()
    t5 = {"model_type": "t5", "relative_attention_num_buckets": 32}
    assert from_hf(t5) == positions.T5(buckets=32, farthest=128)
    gptj = {"model_type": "gptj", "n_embd": 4096, "n_head": 16, "rotary_dim": 64}
    assert from_hf(gptj) == positions.RoPE(fraction=0.25, interleaved=True)
    granite = {"model_type": "granitemoehybrid", "rope_theta": 1e4}
    assert from_hf({**granite, "position_embedding_type": None}) == positions.NoPE()
    assert from_hf({**granite, "position_embedding_type": "rope"}) == positions.RoPE()
    assert from_hf({"text_config": {"model_type": "llama"}}) == positions.RoPE()


def test_phi3_takes_its_lengths_from_beside_the_factors():
    for kind in ("su", "yarn", "longrope"):  # as its releases called it, one after the other
        found = from_hf({**PHI, "rope_scaling": {"type": kind, **FACTORS}})
        assert (found.original, found.factor) == (4096, 32.0)
        assert found.long == tuple(FACTORS["long_factor"])


def test_partial_factor_is_found_in_each_of_its_places():
    half = positions.RoPE(base=5e5, fraction=0.5)
    flat = {"rope_theta": 5e5, "partial_rotary_factor": 0.5}
    assert from_hf(flat) == half
    assert from_hf({"rope_parameters": {"rope_type": "default", **flat}}) == half
    assert from_hf({"rotary_emb_base": 5e5, "rotary_pct": 0.5}) == half
    nested = {"rope_parameters": {"full_attention": flat}, "layer_types": ["full_attention"]}
    assert from_hf(nested) == half
    assert from_hf({**LLAMA, **flat, "rope_parameters": {"rope_type": "default"}}) == half


def test_layers_of_smollm3_and_llama4():
    four = model("smollm3", 64, 4, num_hidden_layers=8, rope_theta=1e4)
    found = from_hf({**four, "no_rope_layers": None, "no_rope_layer_interval": 4})
    assert found.pattern == ("rope", "rope", "rope", "nope")
    assert found.kinds == {"rope": positions.RoPE(), "nope": positions.NoPE()}
    assert from_hf({**four, "no_rope_layers": [1] * 8}) == positions.RoPE()
    assert from_hf({**four, "no_rope_layers": [0] * 8}) == positions.NoPE()
    longer = from_hf({**four, "no_rope_layer_interval": 9})
    assert longer == positions.RoPE()  # the interval exceeds the depth
    uneven = from_hf({**four, "num_hidden_layers": 5, "no_rope_layers": [1, 0, 0, 1, 0]})
    assert uneven.pattern == ("rope", "nope", "nope")

    scout = {**model("llama4_text", 64, 4, num_hidden_layers=8), "rope_scaling": llama3(8.0)}
    found = from_hf({**scout, "attn_scale": 0.2, "floor_scale": 4096})
    assert found.kinds["nope"] == Chain(positions.FloorScale(0.2, 4096), positions.NoPE())
    assert found.kinds["rope"].first == positions.Chunked(8192)
    assert found.kinds["rope"].second.interleaved and found.kinds["rope"].second.base == 5e5
    plain = {"attention_chunk_size": None, "attn_temperature_tuning": False}
    found = from_hf({**scout, **plain})
    assert found.kinds["nope"] == positions.NoPE()
    assert isinstance(found.kinds["rope"], positions.Llama3)


def test_layers_of_gemma3_before_and_after_transformers_5():
    before = from_hf(CONFIGS["Gemma 3, full"].config)
    assert before == from_hf(CONFIGS["Gemma 3, sliding"].config)
    assert before.pattern == (*["sliding_attention"] * 5, "full_attention")
    keys = {k: v for k, v in CONFIGS["Gemma 3, full"].config.items() if k != "layer_types"}
    assert from_hf(keys) == before  # a window in five layers of six, as the model's default says


def test_layers_fit_a_config(tiny):
    """`cfg.model.update(layers.model())` is all there is to do."""
    cfg = tiny("model.depth=5")
    layers = LAYERS["nope in every fourth"]
    cfg.model.update(layers.model())
    spec = models.spec(cfg)
    names = [layers.pattern[n % 4] for n in range(5)]
    kinds = [spec.layers[n % 4].positions for n in range(5)]
    assert kinds == [layers.kinds[name] for name in names]


REFUSED = {
    "type": ({"rope_scaling": {"type": "rope3d"}}, ["'rope3d'", "default, linear, dynamic, yarn"]),
    "embedding": ({"position_embedding_type": "relative_key"}, ["'relative_key'", "absolute"]),
    "nothing": ({"model_type": "mamba"}, ["nothing of positions", "rope_parameters", "bloom"]),
    "slopes": ({"alibi": True, "alibi_bias_max": 16}, ["alibi_bias_max=16", "only 8"]),
    "factor": ({"rope_scaling": {"type": "linear"}}, ["factor is missing", "linear needs it"]),
    "length": ({"rope_scaling": {"type": "dynamic", "factor": 2}}, ["max_position_embeddings is"]),
    "bands": ({"rope_scaling": {"type": "llama3", "factor": 8}}, ["low_freq_factor is missing"]),
    "option": (
        {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 16}},
        ["linear has no beta_fast", "it has rope_theta, partial_rotary_factor, factor"],
    ),
    "kind": (
        {**GEMMA, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        ["layer_types names sliding_attention", "it has full_attention"],
    ),
    "depth": ({"rope_theta": 1e4, "no_rope_layer_interval": 4}, ["num_hidden_layers", "=4 needs"]),
    "ratio": (
        {"rope_scaling": yarn(factor=None)},
        ["max_position_embeddings is missing", "without a factor"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configs_that_cannot_be_read(name):
    config, says = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        from_hf(config)
    for text in says:
        assert text in str(error.value)


UNWRITTEN = {
    "class": (positions.CLEX(), ["CLEX has no Hugging Face form", "NoPE, ALiBi, T5, Learned"]),
    "remap": (positions.ReRoPE(), ["ReRoPE has no"]),
    "subclass": (positions.DynamicYaRN(original=64), ["DynamicYaRN has no"]),
    "chain": (Chain(positions.LogN(64), positions.RoPE()), ["Chain has no", "chunked+rope"]),
    "field": (positions.DynamicNTK(original=64, length=9), ["DynamicNTK(length=9)", "at 0"]),
    "std": (positions.T5(std=1.0), ["T5(std=1.0)", "0.02"]),
    "keep": (positions.Learned(64, keep=20), ["Learned(keep=20)"]),
    "original": (positions.YaRN(factor=2.0), ["YaRN(original=0)", "set original"]),
    "rows": (positions.Learned(), ["Learned(length=0)"]),
    "two lengths": (
        Layers(
            {"a": positions.DynamicNTK(original=64), "b": positions.DynamicNTK(original=32)},
            ("a", "b"),
        ),
        ["layers differ", "dynamic NTK"],
    ),
    "two orders of pairs": (
        Layers({"a": positions.RoPE(), "b": positions.RoPE(interleaved=True)}, ("a", "b")),
        ["layers differ", "interleaved"],
    ),
}


@pytest.mark.parametrize("name", UNWRITTEN)
def test_encodings_that_have_no_hugging_face_form(name):
    encoding, says = UNWRITTEN[name]
    with pytest.raises(ConfigError) as error:
        to_hf(encoding)
    for text in says:
        assert text in str(error.value)
