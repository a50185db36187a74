"""Models written as folders: what transformers makes of them, and what comes back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcm
from lcm import config, models, pretrained, training
from lcm.errors import CheckpointError, ConfigError
from lcm.pretrained import Model, export
from lcm.pretrained.families import REGISTRY

from . import cases, make_golden

GOLDEN = np.load(make_golden.FOLDER / "logits.npz")


def transformers_logits(folder, tokens):
    pytest.importorskip("torch", reason="transformers computes with torch")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, dtype="float32"
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    return make_golden.logits(model.eval(), tokens)


def assert_same(a, b):
    """Every bit of every parameter."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.mark.quick(
    "llama, biases, tied",
    "qwen2, yarn",
    "gemma3",
    "gpt_neox",
    "bloom",
    "mamba2",
    "qwen3_next",
    "zamba*",
)
@pytest.mark.parametrize("name", cases.CONFIGS)
def test_what_is_exported_is_the_model(loaded, tmp_path, name):
    model = loaded(name)
    out = pretrained.save_folder(model, tmp_path / "out")
    again = pretrained.load(out)
    assert_same(again.params, model.params)
    assert not export.differences(models.spec(again.cfg), models.spec(model.cfg))
    assert again.cfg.data.length == model.cfg.data.length
    got = transformers_logits(out, cases.tokens())[:, make_golden.PLACES]
    np.testing.assert_allclose(got, GOLDEN[name], rtol=1e-4, atol=1e-4)


def fresh(*assignments: str) -> Model:
    """A model of lcm's own, as training makes it."""
    cfg = config.override(config.shrink(config.base()), assignments)
    return Model(cfg, models.init(cfg, jax.random.key(0)), None, 0)


def local(window: int) -> list[str]:
    """A pattern of layers that see all and layers with a window."""
    kinds = {"full_attention": 0, "sliding_attention": window}
    windows = [f"model.kinds.{kind}.window={size}" for kind, size in kinds.items()]
    return [f"model.pattern={','.join(kinds)}", *windows]


FACTORS = ["short=1.0,1.5,2.0,3.0,4.0,5.0,6.0,7.0", "long=2.0,3.0,4.0,5.0,6.0,7.0,8.0,9.0"]
LONGROPE = ["model.positions=longrope", *(f"model.positions.{x}" for x in [*FACTORS, "factor=2"])]
MPT = ["model.positions=alibi", "model.mlp=gelu_exact", "model.norm=layer_no_bias"]
OWN = {
    "default": ([], "llama"),
    "heads that do not divide the width": (["model.heads=3", "model.head_size=8"], "mistral"),
    "qkv": (["model.biases=qkv", "model.positions=llama3"], "qwen2"),
    "longrope": (LONGROPE, "llama"),
    "no encoding": (["model.positions=nope"], "granitemoehybrid"),
    "window in a pattern": ([*local(8), "model.qk_norm=True"], "qwen3"),
    "alibi": ([*MPT, "model.hidden=128", "data.length=64"], "mpt"),
}


@pytest.mark.parametrize("name", OWN)
def test_models_of_our_own_find_their_family(tmp_path, name):
    assignments, family = OWN[name]
    model = fresh(*assignments)
    out = pretrained.save_folder(model, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["model_type"] == family
    assert_same(pretrained.load(out).params, model.params)
    tokens = np.random.default_rng(0).integers(0, 256, (1, 40))
    want, _ = models.apply(model.cfg, model.params, jnp.asarray(tokens))
    np.testing.assert_allclose(transformers_logits(out, tokens), want, rtol=1e-4, atol=1e-4)


def test_shards_and_their_index(loaded, tmp_path, monkeypatch):
    whole = pretrained.save_folder(loaded("gemma2"), tmp_path / "whole")
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    out = pretrained.save_folder(loaded("gemma2"), tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 2 and files == sorted(f.name for f in out.glob("*.safetensors"))
    assert all((out / f).stat().st_size < 25_000 for f in files)
    assert_same(pretrained.load(out).params, pretrained.load(whole).params)
    got = transformers_logits(out, cases.tokens())[:, make_golden.PLACES]
    np.testing.assert_allclose(got, GOLDEN["gemma2"], rtol=1e-4, atol=1e-4)


def test_bfloat16_out_is_what_was_in(folder, tmp_path):
    model = pretrained.load(folder("gemma3", dtype="bfloat16"), dtype="bfloat16")
    out = pretrained.save_folder(model, tmp_path / "out", dtype="bfloat16")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    a, b = pretrained.Folder(tmp_path / "model"), pretrained.Folder(out)
    assert {*a.names()} == {*b.names()}
    for name in a.names():
        np.testing.assert_array_equal(a.read(name), b.read(name), err_msg=name)


def test_template_and_ends_of_a_model_go_along(tmp_path):
    from lcm.data import tokenizers

    model = fresh()._replace(tokenizer=tokenizers.load("bytes"), chat_template="{{ messages }}")
    out = pretrained.save_folder(model, tmp_path / "out")
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 256


@pytest.mark.slow
def test_from_a_run_to_transformers_and_back(tmp_path):
    cfg = config.shrink(config.base())
    cfg = config.override(cfg, ["train.steps=2", "train.warmup=1", "model.norm_eps=1e-5"])
    training.train(cfg, tmp_path / "run")
    run = lcm.load(tmp_path / "run")
    assert run.step == 2 and run.tokenizer.eos == 256
    out = pretrained.save_folder(run, tmp_path / "out")
    again = lcm.load(out)
    assert_same(again.params, run.params)
    assert again.cfg.model.norm_eps == 1e-5 and again.cfg.data.length == 32
    half = lcm.load(tmp_path / "run", dtype="bfloat16").params
    assert half["embedding"]["table"].dtype == "bfloat16"
    assert half["final_norm"]["scale"].dtype == "float32"
    tokens = np.random.default_rng(0).integers(0, 256, (1, 40))
    want, _ = models.apply(run.cfg, run.params, jnp.asarray(tokens))
    np.testing.assert_allclose(transformers_logits(out, tokens), want, rtol=1e-4, atol=1e-4)


REFUSED = {
    "encoding": (["model.positions=cope"], "CoPE has no Hugging Face form"),
    "learned": (["model.positions=learned"], "Learned(length=0)"),
    "fresh norm": (["model.norm=layer"], "norm is rms, not layer"),
    "pairs": (["model.positions.interleaved=True"], "interleaved=True"),
    "cap": (["model.score_cap=20"], "score_cap is 0.0, not 20.0"),
    "part of a head": (
        ["model.positions.fraction=0.5", "model.qk_norm=True"],
        "qk_norm is False, not True",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_family_has_is_named(tmp_path, name):
    assignments, says = REFUSED[name]
    with pytest.raises(ConfigError, match="no family of models has all") as error:
        pretrained.save_folder(fresh(*assignments), tmp_path / "out")
    assert says in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "pattern", "says"),
    [
        ("jamba", "attention", "layers are attention, it has mamba1, perhaps attention"),
        ("jamba", "mamba1,rglru", "layers are mamba1, rglru, it has mamba1, perhaps attention"),
        ("granitemoehybrid", "rglru", "layers are rglru, it has perhaps attention, perhaps mamba2"),
        ("lfm2", "gated_conv", "layers are gated_conv, it has gated_conv, attention"),
    ],
)
def test_mixers_that_a_family_has_not_are_named(kind, pattern, says):
    cfg = config.override(config.shrink(config.base()), [f"model.pattern={pattern}"])
    with pytest.raises(ConfigError, match=f"^{says}$"):
        REGISTRY[kind].write(models.spec(cfg), 32)


def test_nothing_is_lost_or_left_behind(tmp_path, monkeypatch):
    model, out = fresh(), tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is not empty: choose another"):
        pretrained.save_folder(model, out)
    assert [f.name for f in out.iterdir()] == ["mine"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_weights", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*make room"):
        pretrained.save_folder(model, tmp_path / "other")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    pretrained.save_folder(model, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
