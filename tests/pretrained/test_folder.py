"""Folders as they come: formats of numbers, shards, older names, and those that are refused."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lcm import evaluation, models, pretrained
from lcm.errors import CheckpointError, ConfigError, UserError
from lcm.evaluation import EvaluationError
from lcm.pretrained import REGISTRY, Folder, assemble
from lcm.pretrained.families import base

from . import cases


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def changed(folder, change):
    """The folder with `change` made to its tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors), file)
    return folder


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_are_those_of_the_file(folder, dtype):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    _, params = assemble(Folder(folder("phi3", dtype=dtype)))
    table = cases.tensor("model.embed_tokens.weight", (cases.VOCAB, 32)).astype(kind)
    gate_up = cases.tensor("model.layers.1.mlp.gate_up_proj.weight", (96, 32)).astype(kind)
    assert params["embedding"]["table"].dtype == jnp.float32
    np.testing.assert_array_equal(params["embedding"]["table"], table.astype(np.float32))
    up = gate_up[48:].T.astype(np.float32)
    np.testing.assert_array_equal(params["layers"]["0"]["mlp"]["up"][1], up)


def test_parameters_in_bfloat16_save_for_the_norms(folder, loaded):
    cfg, params = assemble(Folder(folder("gemma3")), dtype="bfloat16")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.dtype == ("float32" if name.endswith("norm/scale") else "bfloat16"), name
    _, mamba = assemble(Folder(folder("mamba", at="mamba")), dtype="bfloat16")
    kinds = {name: mamba["layers"]["0"]["mixer"][name].dtype for name in ("A_log", "dt_bias", "x")}
    assert kinds == {"A_log": "float32", "dt_bias": "float32", "x": "bfloat16"}
    wide = loaded("gemma3")
    row = jnp.asarray(cases.tokens())
    got, want = models.apply(cfg, params, row)[0], models.apply(wide.cfg, wide.params, row)[0]
    assert 0 < np.abs(got - want).max() < 0.5
    with pytest.raises(ConfigError, match=r"dtype='int8' is unknown: choose from float32, bf"):
        assemble(Folder(folder("gemma3")), dtype="int8")


def test_shards_are_the_whole(folder, loaded):
    _, params = assemble(Folder(folder("qwen3", shards=3)))
    assert same(params, loaded("qwen3").params)


def test_other_names_of_the_same_tensors(folder, loaded):
    """BLOOM without its head, GPT-NeoX of transformers 5 and with masks, a repeated tied head."""
    bare = changed(
        folder("bloom"), lambda t: {k.removeprefix("transformer."): x for k, x in t.items()}
    )
    assert same(assemble(Folder(bare))[1], loaded("bloom").params)
    mask = {"gpt_neox.layers.0.attention.bias": np.ones((1, 1, 4, 4), np.bool_)}
    neox = changed(
        folder("gpt_neox", at="neox"),
        lambda t: {**{k.replace("embed_out", "lm_head"): x for k, x in t.items()}, **mask},
    )
    assert same(assemble(Folder(neox))[1], loaded("gpt_neox").params)
    repeated = lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]}  # noqa: E731
    tied = changed(folder("gemma2", at="tied"), repeated)
    assert same(assemble(Folder(tied))[1], loaded("gemma2").params)


@pytest.mark.parametrize("to", [r"language_model.model.", r"model.language_model."])
def test_the_text_part_of_a_model_that_sees(folder, loaded, to):
    eye = {"vision_tower.encoder.weight": np.ones((2, 2), np.float32)}
    path = changed(
        folder("gemma3"), lambda t: {**{k.replace("model.", to, 1): x for k, x in t.items()}, **eye}
    )
    text = json.loads((path / "config.json").read_text())
    silent = ("hidden_activation", "tie_word_embeddings", "rms_norm_eps")
    text = {k: v for k, v in text.items() if k not in silent}
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}}
    (path / "config.json").write_text(json.dumps(outer))
    cfg, params = assemble(Folder(path))
    assert same(params, loaded("gemma3").params)
    assert models.spec(cfg) == models.spec(loaded("gemma3").cfg)


def test_what_a_config_leaves_out_is_what_transformers_takes(folder, loaded):
    """A key that is null is not one that is absent."""
    silent = assemble(Folder(folder("gemma2", drop=("final_logit_softcapping",))))[0]
    assert silent.model.logit_cap == 30
    assert assemble(Folder(folder("gemma2", final_logit_softcapping=None)))[0].model.logit_cap == 0
    assert assemble(Folder(folder("mistral", drop=("sliding_window",))))[0].model.window == 4096
    assert assemble(Folder(folder("mistral", sliding_window=None)))[0].model.window == 0
    off = folder("qwen2", use_sliding_window=False)
    assert assemble(Folder(off))[0].model.pattern == ("attention",)


@pytest.mark.parametrize("kind", sorted(REGISTRY))
def test_every_default_is_that_of_transformers(kind):
    transformers = pytest.importorskip("transformers", reason="the classes hold the defaults")
    pytest.importorskip("torch")
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers has no {kind}")
    own = transformers.AutoConfig.for_model(kind)
    theirs = getattr(own, "text_config", own).to_dict()
    theirs = {**theirs.get("attn_config", {}), **theirs}
    rope = theirs.get("rope_parameters") or {}
    theirs.setdefault("rope_theta", rope.get("full_attention", rope).get("rope_theta"))
    theirs.setdefault("partial_rotary_factor", rope.get("partial_rotary_factor"))
    theirs["rope_local_base_freq"] = rope.get("sliding_attention", {}).get("rope_theta")
    skipped = {"sliding_window_pattern", "seq_length"}  # of older configs, and of none
    if kind not in ("mistral", "gemma2", "gemma3", "gemma3_text"):
        skipped.add("sliding_window")  # read by none but these where nothing asks for it
    for key, value in REGISTRY[kind].defaults.items():
        if key not in skipped:
            assert theirs[key] == value, key


def test_load_finds_the_tokenizer_of_a_folder(folder):
    tokenizers = pytest.importorskip("tokenizers")
    path = folder("llama")
    model = pretrained.load(path)
    assert model.tokenizer is None and model.chat_template == "" and model.step == 0
    assert model.cfg.name == path.name
    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(path / "tokenizer.json"))
    model = pretrained.load(path)
    assert (model.tokenizer.bos, model.tokenizer.eos) == (0, 1)
    assert model.cfg.data.tokenizer == str(path)
    out = pretrained.save_folder(model, path.with_name("out"))
    assert pretrained.load(out).tokenizer.eos == 1


def without(name):
    return lambda t: {k: x for k, x in t.items() if k != name}


NORM = "model.layers.1.input_layernorm.weight"
TENSORS = {
    "missing": (without(NORM), [f"tensor {NORM} (32,) is missing"]),
    "shape": (
        lambda t: {**t, NORM: np.ones(31, np.float32)},
        [f"tensor {NORM} has shape (31,)", "asks for (32,)"],
    ),
    "unused": (
        lambda t: {**t, "model.layers.2.mlp.up_proj.weight": np.ones((2, 2), np.float32)},
        ["1 tensors have no place", "model.layers.2.mlp.up_proj.weight"],
    ),
    "quantised": (
        lambda t: {**t, NORM: np.ones(32, np.int8)},
        [NORM, "is I8, readable are F32, F16, BF16", "not quantised"],
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_named(folder, name):
    change, says = TENSORS[name]
    path = changed(folder("llama"), change)
    with pytest.raises(CheckpointError) as error:
        assemble(Folder(path))
    for text in says:
        assert text in str(error.value)


CONFIGS = {
    "architecture": ("llama", {"model_type": "gpt2"}, "'gpt2' is unknown: known are llama, mis"),
    "encoder": ("llama", {"model_type": "t5"}, "model_type=t5 is an encoder and a decoder"),
    "experts": ("llama", {"num_local_experts": 8}, "num_local_experts=8 asks for what the decoder"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config=..."),
    "both ways": ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "activation": ("llama", {"hidden_act": "relu"}, "hidden_act='relu' is not what the decoder"),
    "size": ("llama", {"hidden_size": None}, "hidden_size is missing"),
    "partial": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "interleaved": ("llama", {"rope_interleave": True}, "interleaved=True"),
    "some rotated": ("llama", {"no_rope_layers": [1, 0]}, "differ by layer (rope, nope)"),
    "phi": ("phi3", cases.rope("linear", factor=2.0), "it has RoPE and LongRoPE"),
    "residual": ("bloom", {"apply_residual_connection_post_layernorm": True}, "=True is not what"),
    "clip": ("mpt", {"attn_config": {"alibi": True, "clip_qkv": 6}}, "clip_qkv=6"),
    "learned": ("mpt", {"attn_config": {"alibi": False}}, "alibi=False"),
    "heads": ("llama", {"num_attention_heads": 3}, "model.kv_heads=2 does not divide"),
    "kind of layer": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["linear_attention"] * 2},
        "names linear_attention",
    ),
    "length": ("llama", {"max_position_embeddings": None}, "none of max_position_embeddings"),
    "clipped steps": ("mamba2", {"time_step_limit": [0.001, 0.1]}, "time_step_limit=(0.001, 0.1)"),
    "heads of mamba": ("mamba2", {"num_heads": 3}, "num_heads=3 times head_dim=16 is not"),
    "biases of mamba": ("mamba", {"use_bias": True}, "use_bias=True"),
    "blocks": ("recurrent_gemma", {"block_types": ["mlp"]}, "block_types has 'mlp'"),
    "odd": ("recurrent_gemma", {"intermediate_size": 47}, "intermediate_size=47 is odd"),
    "some experts": ("qwen3_next, experts", {"mlp_only_layers": [1]}, "mlp_only_layers=[1] has"),
    "blocks apart": ("zamba2", {"tie_word_embeddings": False}, "tie_word_embeddings=False is not"),
    "no blocks": ("zamba2", {"layers_block_type": ["mamba"] * 3}, "has no hybrid layer"),
    "layers of zamba": ("zamba2", {"layers_block_type": ["moe"] * 3}, "names moe, which is none"),
    "cap": ("gemma3", {"attn_logit_softcapping": 20.0}, "attn_logit_softcapping=20.0"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_other_models_are_refused(folder, name):
    case, keys, says = CONFIGS[name]
    with pytest.raises(ConfigError) as error:
        assemble(Folder(folder(case, **keys)))
    assert says in str(error.value)


LISTED = ("qwen2", "gemma2", "gemma3", "qwen3_next", "qwen3_5", "olmo_hybrid", "granite")
LISTED += ("kimi_linear", "lfm2", "lfm2_moe", "zamba2")


@pytest.mark.parametrize("name", LISTED)
def test_lists_of_layers_that_are_not_of_the_model_are_refused(folder, name):
    key = "layers_block_type" if name == "zamba2" else "layer_types"
    depth = cases.CONFIGS[name]["num_hidden_layers"]
    for names, says in (
        (["full_attention"] * (depth + 1), f"has {depth + 1} names for num_hidden_layers={depth}"),
        (["odd"] * depth, "names odd, which is none of "),
    ):
        with pytest.raises(ConfigError, match=f"^{key} {says}.*: take "):
            assemble(Folder(folder(name, **{key: names})))


@pytest.mark.parametrize("value", ["32", 32.0, 0, True, [32, 32]])
def test_sizes_are_whole_numbers(value):
    base.check_sizes({"hidden_size": np.int64(32), "head_dim": None})
    with pytest.raises(ConfigError, match=r"head_dim=.* must be a whole number, 1 or more"):
        base.check_sizes({"hidden_size": 32, "head_dim": value})


def test_damaged_files_are_named(folder):
    path = folder("llama")
    file = path / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read.*cut short"):
            pretrained.load(path)
    source = Folder(folder("llama"))
    file.write_bytes(whole[:-1])  # after it was opened
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight of .*model\.safetensors"):
        source.read("lm_head.weight")
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        pretrained.load(path)


def test_shards_that_are_missing_are_named(folder):
    path = folder("llama", shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 3 shards, of which model-00002-of-00003"):
        pretrained.load(path)


def test_an_index_without_a_map_is_named(folder):
    path = folder("llama", shards=2)
    for index in ("{}", '{"weight_map": []}', "[]", "{"):
        (path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
            pretrained.load(path)


def test_pickles_are_refused_with_a_way_out(folder):
    path = folder("llama")
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        pretrained.load(path)
    for name in ("pytorch_model.bin", "a.pt", "consolidated.00.pth", "a.ckpt"):
        (path / name).write_bytes(b"cos\nsystem\n")
        with pytest.raises(CheckpointError, match=rf"{name}, a pickle.*safe_serialization=True"):
            pretrained.load(path)
        (path / name).unlink()


def test_a_model_without_a_tokenizer_reads_no_documents(loaded):
    with pytest.raises(EvaluationError, match=r"without a tokenizer.*give it one"):
        evaluation.evaluate_model(loaded("llama"))


def test_what_is_no_model_at_all(tmp_path):
    with pytest.raises(UserError, match="workdir"):
        pretrained.load(tmp_path / "nothing")
