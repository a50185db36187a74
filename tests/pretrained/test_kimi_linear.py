"""Kimi Linear: the config of the release, names of tensors, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lcm import config, models, pretrained
from lcm.errors import ConfigError
from lcm.pretrained import Folder, assemble, export
from lcm.pretrained.assemble import read_config
from lcm.pretrained.families import family_of

# Kimi-Linear-48B-A3B in the words of its own config, where transformers has others; all sizes that
# are not here are the defaults of transformers.
RELEASE = {
    "model_type": "kimi_linear",
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "num_expert_group": 1,
    "mla_use_nope": True,
    "head_dim": 72,
    "model_max_length": 1_048_576,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [n for n in range(1, 27) if n % 4],
        "head_dim": 128,
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
}


def test_a_config_in_the_words_of_the_release():
    cfg = read_config(family_of(RELEASE), RELEASE)
    spec = models.spec(cfg)
    full = [n + 1 for n, layer in enumerate(spec.in_order) if layer.mixer == "latent_attention"]
    assert full == RELEASE["linear_attn_config"]["full_attn_layers"]
    assert [layer.mlp for layer in spec.in_order] == ["swiglu", *["experts"] * 26]
    delta, latent = spec.in_order[1], spec.in_order[3]
    assert (delta.heads, delta.state, delta.head_size, delta.inner) == (32, 128, 128, 4096)
    assert (latent.heads, latent.head_size, latent.dims.head_size) == (32, 128, 64)
    assert (latent.option("rank"), latent.option("values")) == (512, 128)
    assert latent.mlp_option("count") == 256 and latent.mlp_option("shared") == latent.hidden
    assert cfg.data.length == 1_048_576
    assert 48e9 < models.parameter_count(cfg) < 50e9
    assert models.state_bytes_per_token(cfg) == 7 * (4 * (512 + 64) + 8)


@pytest.mark.parametrize("said", [RELEASE, {"model_type": "kimi_linear"}], ids=["said", "silent"])
def test_configs_mean_what_they_do_to_transformers(said):
    """Read here, or by transformers and, in its own words with nothing left to defaults, here."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    theirs = transformers.AutoConfig.for_model(**said).to_dict()
    theirs.pop("linear_attn_config", None)
    said = {**said, "model_max_length": theirs["model_max_length"]}
    ours, theirs = (models.spec(read_config(family_of(x), x)) for x in (said, theirs))
    assert not export.differences(ours, theirs)


def test_a_dense_layer_has_either_name(folder, loaded):
    """That of the release, and that which transformers writes."""
    path = folder("kimi_linear")
    tensors = load_file(path / "model.safetensors")
    named = {
        name.replace(".0.block_sparse_moe.", ".0.mlp."): tensor for name, tensor in tensors.items()
    }
    assert len(named.keys() - tensors.keys()) == 3
    save_file(named, path / "model.safetensors")
    _, params = assemble(Folder(path))
    jax.tree.map(np.testing.assert_array_equal, params, loaded("kimi_linear").params)


def test_what_choices_hang_on_stays_exact(folder):
    params = pretrained.load(folder("kimi_linear"), dtype="bfloat16").params["layers"]["1"]
    assert params["mlp"]["choice_bias"].dtype == jnp.float32
    assert params["mlp"]["router"].dtype == jnp.bfloat16


REFUSED = {
    "kinds": ({"layer_types": ["sliding_attention"] * 3}, "names sliding_attention, which is none"),
    "count": ({"num_hidden_layers": 4}, "layer_types has 3 names for num_hidden_layers=4"),
    "groups": ({"num_expert_group": 5}, "num_expert_group=5 is not what the decoder has: it has 1"),
    "by their other name": ({"n_group": 5}, "num_expert_group=5 is not what"),
    "biases": ({"attention_bias": True}, "attention_bias=True is not what the decoder has"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu' is not what"),
    "key heads": ({"num_key_value_heads": 2}, "num_key_value_heads=2 is not what"),
    "rotations": ({"mla_use_nope": False}, "mla_use_nope=False is not what"),
    "scores": ({"moe_router_activation_func": "softmax"}, "='softmax' is not what"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not what"),
    "none shared": ({"num_shared_experts": 0}, "num_shared_experts=0 leaves tokens without"),
    "too many": ({"num_experts_per_token": 6}, "top=6 chooses among count=5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_configs_are_refused(folder, name):
    keys, says = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        assemble(Folder(folder("kimi_linear", **keys)))
    assert says in str(error.value) and "\n" not in str(error.value)


LOST = {
    "rotations": (["positions=rope"], "positions is NoPE"),
    "a rank of its own": (["kinds.linear_attention_dense.options=rank=9"], "options is"),
    "gated": (["kinds.linear_attention_sparse.mlp_options=count=5,shared=40"], "mlp_options is"),
    "norms": (["post_norm=True"], "post_norm is False, not True"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_it_cannot_say_is_named(loaded, name):
    keys, says = LOST[name]
    cfg = config.override(loaded("kimi_linear").cfg, [f"model.{key}" for key in keys])
    with pytest.raises(ConfigError, match=f"of kimi_linear, the nearest: .*{says}"):
        export.family_for(cfg)
