"""OLMo-Hybrid: folders as transformers writes them, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lcm import config, models
from lcm.errors import CheckpointError, ConfigError
from lcm.pretrained import Folder, assemble
from lcm.pretrained.assemble import read_config
from lcm.pretrained.families import family_of

from . import cases, make_golden

PART = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
TAPS = "model.layers.0.linear_attn.{}_conv1d.weight"


def cut(folder, rows):
    """The folder with the taps of q, k and v of layer 0 cut into parts of so many rows."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    three = np.concatenate([tensors[TAPS.format(name)] for name in "qkv"])
    parts = np.split(three, np.cumsum(rows)[:-1])
    parts = {TAPS.format(n): np.ascontiguousarray(p) for n, p in zip("qkv", parts, strict=True)}
    save_file({**tensors, **parts}, file)
    return folder


def test_taps_in_parts_of_any_size_are_the_same(folder, loaded):
    want = loaded("olmo_hybrid").params["layers"]["0"]["mixer"]
    _, params = assemble(Folder(cut(folder("olmo_hybrid"), (43, 43, 10))))
    for name in ("conv_q", "conv_k", "conv_v"):
        np.testing.assert_array_equal(params["layers"]["0"]["mixer"][name], want[name])


@pytest.mark.slow
def test_taps_of_unlike_channels_as_transformers_writes_them(tmp_path):
    torch = pytest.importorskip("torch", reason="transformers computes with torch")
    transformers = pytest.importorskip("transformers")
    own = cases.olmo_hybrid(linear_value_head_dim=12)  # 32, 32 and 48, written as 38, 38 and 36
    hf = transformers.AutoConfig.for_model(**own)
    model = transformers.AutoModelForCausalLM.from_config(hf, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(cases.tensor(name, tuple(parameter.shape))))
    model.save_pretrained(tmp_path / "model")
    assert Folder(tmp_path / "model").shape(TAPS.format("v")) == (36, 1, 4)
    cfg, params = assemble(Folder(tmp_path / "model"))
    got, _ = models.apply(cfg, params, jnp.asarray(cases.tokens()))
    want = make_golden.logits(model, cases.tokens())
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_taps_that_are_too_few_are_named(folder):
    path = cut(folder("olmo_hybrid"), (43, 43, 10))
    tensors = load_file(path / "model.safetensors")
    last = TAPS.format("v")
    save_file({**tensors, last: tensors[last][:-1]}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"_conv1d.weight has shape \(43, .*asks for \(32, 1"):
        assemble(Folder(path))


def test_what_the_release_has():
    """Sizes of Olmo-Hybrid 7B, which transformers takes where the config is silent."""
    hf = {"model_type": "olmo_hybrid"}
    cfg = read_config(family_of(hf), hf)
    delta, attention = (cfg.model.kinds[n] for n in ("linear_attention", "full_attention"))
    assert cfg.model.pattern == (*["linear_attention"] * 3, "full_attention")
    assert (delta["heads"], delta["state"], delta["head_size"]) == (30, 96, 192)
    assert delta["options"] == "negative=True,eps=1e-05" and cfg.model.norm_eps == 1e-6
    assert attention["options"] == "across=True" and not attention["pre_norm"]


REFUSED = {
    "kinds": ({"layer_types": ["sliding_attention"] * 3}, "names sliding_attention, which is none"),
    "one kind": ({"layer_types": ["full_attention"] * 3}, "layer_types has no linear_attention"),
    "count": ({"num_hidden_layers": 4}, "layer_types has 3 names for num_hidden_layers=4"),
    "biases": ({"attention_bias": True}, "attention_bias=True is not what the decoder has"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu' is not what"),
    "heads": ({"linear_num_value_heads": 3}, "kv_heads=2 does not divide"),
    "part of a head": ({"rope_parameters": PART}, "partial_rotary_factor=0.5 rotates a part"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_configs_are_refused(folder, name):
    keys, says = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        assemble(Folder(folder("olmo_hybrid", **keys)))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["pre_norm=False"], "model.pre_norm=False leaves layers without norms"),
        (["options=across=True"], "says how model.qk_norm=False normalises: set it to True"),
    ],
)
def test_norms_that_go_together(keys, says):
    cfg = config.override(config.shrink(config.base()), [f"model.{key}" for key in keys])
    with pytest.raises(ConfigError, match=says):
        models.spec(cfg)
