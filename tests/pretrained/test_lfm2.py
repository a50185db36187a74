"""LFM2: sizes of the releases, widths of MLPs, folders of our own models, and what is refused."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from lcm import config, models, pretrained
from lcm.errors import ConfigError
from lcm.pretrained import Folder, assemble, export
from lcm.pretrained.assemble import read_config
from lcm.pretrained.families import family_of

ROOT = pathlib.Path(__file__).parents[2]
# LFM2-1.2B in the words of its first config, which transformers reads too; all sizes that are not
# here are the defaults of transformers.
RELEASE = {
    "model_type": "lfm2",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "block_ff_dim": 12_288,
    "block_use_swiglu": True,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "use_pos_enc": True,
    "tie_embedding": True,
}
MOE = {  # LFM2-8B-A1B
    "model_type": "lfm2_moe",
    "num_hidden_layers": 24,
    "layer_types": ["full_attention" if n in (2, 6, 10, 14, 18, 21) else "conv" for n in range(24)],
}


def test_a_config_in_the_words_of_the_release():
    cfg = read_config(family_of(RELEASE), RELEASE)
    spec = models.spec(cfg)
    assert [n for n, layer in enumerate(spec.in_order) if layer.attends] == [2, 5, 8, 10, 12, 14]
    attention, conv = spec.in_order[2], spec.in_order[0]
    assert (attention.heads, attention.kv_heads, attention.head_size) == (32, 8, 64)
    assert attention.qk_norm and attention.positions.base == 1e6
    assert (conv.mixer, conv.conv, conv.biases, conv.hidden) == ("gated_conv", 3, "none", 8192)
    assert models.parameter_count(cfg) == 1_170_340_608  # as its card says
    assert cfg.data.length == 128_000


def test_the_release_with_experts():
    cfg = read_config(family_of(MOE), MOE)
    spec = models.spec(cfg)
    assert [layer.mlp for layer in spec.in_order] == ["swiglu"] * 2 + ["experts"] * 22
    assert models.parameter_count(cfg) == 8_339_929_856 + 22 * 32  # its card, and what corrects
    option = spec.in_order[2].mlp_option
    assert (option("count"), option("top"), option("least")) == (32, 4, 1e-6)


SAID = {"said": RELEASE, "silent": {"model_type": "lfm2"}, "experts": MOE}


@pytest.mark.parametrize("name", SAID)
def test_configs_mean_what_they_do_to_transformers(name):
    """Read here, or by transformers and, in its own words with nothing left to defaults, here."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    theirs = transformers.AutoConfig.for_model(**SAID[name]).to_dict()
    ours, theirs = (models.spec(read_config(family_of(x), x)) for x in (SAID[name], theirs))
    assert not export.differences(ours, theirs)


ADJUSTED = {
    "plainly": {"block_auto_adjust_ff_dim": False},
    "two thirds": {"block_multiple_of": 1},
    "rounded up": {"block_multiple_of": 64},
    "a factor": {"block_ffn_dim_multiplier": 1.3, "block_multiple_of": 7},
    "by its first name": {"block_ff_dim": 200, "block_multiple_of": 8},
}


@pytest.mark.parametrize("name", ADJUSTED)
def test_widths_of_mlps_are_those_of_transformers(name):
    torch = pytest.importorskip("torch", reason="transformers computes with torch")
    pytest.importorskip("transformers")
    from transformers.models.lfm2 import configuration_lfm2, modeling_lfm2

    sizes = {"hidden_size": 32, "intermediate_size": 100, "num_attention_heads": 8}
    hf = {"model_type": "lfm2", "num_hidden_layers": 2, **sizes, **ADJUSTED[name]}
    with torch.device("meta"):
        theirs = modeling_lfm2.Lfm2MLP(configuration_lfm2.Lfm2Config(**hf)).w1.out_features
    assert models.spec(read_config(family_of(hf), hf)).layers[0].hidden == theirs


@pytest.mark.parametrize(("name", "hidden"), [("lfm2", 40), ("lfm2, biases", 48)])
def test_the_width_of_mlps_is_written_as_it_is(loaded, name, hidden):
    _, hf = export.family_for(loaded(name).cfg)
    assert (hf["intermediate_size"], hf["block_auto_adjust_ff_dim"]) == (hidden, False)


def test_what_choices_hang_on_stays_exact(folder):
    params = pretrained.load(folder("lfm2_moe"), dtype="bfloat16").params["layers"]["1"]
    assert params["mlp"]["choice_bias"].dtype == jnp.float32
    assert params["mlp"]["router"].dtype == jnp.bfloat16


def test_the_shape_that_ships_is_written_as_one(tmp_path):
    cfg = config.load(f"{ROOT}/configs/recurrent.py:lfm2")
    model = pretrained.Model(cfg, models.init(cfg, jax.random.key(0)), None, 0)
    out = pretrained.save_folder(model, tmp_path / "out")
    assert Folder(out).config["model_type"] == "lfm2"
    again = pretrained.load(out)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), model.params, again.params))


REFUSED = {
    "kinds": ("lfm2", {"layer_types": ["mamba"] * 3}, "names mamba, which is none of conv, full_"),
    "count": ("lfm2", {"num_hidden_layers": 4}, "layer_types has 3 names for num_hidden_layers=4"),
    "beyond": ("lfm2, biases", {"full_attn_idxs": [0, 2]}, "full_attn_idxs has 2 for num_hidden_"),
    "factor": ("lfm2", {"block_ffn_dim_multiplier": None}, "block_ffn_dim_multiplier is missing"),
    "unit": ("lfm2", {"block_multiple_of": 0}, "block_multiple_of=0 must be at least 1"),
    "taps": ("lfm2", {"conv_L_cache": 0}, "conv=0 must be more than 0"),
    "heads": ("lfm2", {"num_key_value_heads": 3}, "kv_heads=3 does not divide"),
    "no rotations": ("lfm2", {"use_pos_enc": False}, "use_pos_enc=False is not what"),
    "no gates": ("lfm2", {"block_use_swiglu": False}, "block_use_swiglu=False is not what"),
    "experts": ("lfm2", {"num_experts": 4}, "num_experts=4 asks for what the decoder does not"),
    "no kinds": ("lfm2_moe", {"layer_types": None}, "layer_types is missing from the config"),
    "kinds of experts": ("lfm2_moe", {"layer_types": ["conv"]}, "layer_types has 1 names for num_"),
    "too many": ("lfm2_moe", {"num_experts_per_tok": 6}, "top=6 chooses among count=5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_configs_are_refused(folder, name):
    case, keys, says = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        assemble(Folder(folder(case, **keys)))
    assert says in str(error.value) and "\n" not in str(error.value)


LOST = {
    "biases": ("lfm2", ["kinds.conv.biases=all"], "of lfm2, .*biases is none, not all"),
    "plain queries": ("lfm2", ["kinds.full_attention.qk_norm=False"], "qk_norm is True, not False"),
    "other MLPs": ("lfm2", ["kinds.conv.hidden=24"], "of lfm2, the nearest: hidden is 24, not 40"),
    "no sum": ("lfm2_moe", ["kinds.conv_sparse.mlp_options=count=5"], "of lfm2_moe, .*mlp_options"),
    "dense at last": (
        "lfm2_moe",
        ["pattern=conv_sparse,full_attention_sparse,conv_dense"],
        "mlp is swiglu, not experts",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_what_it_cannot_say_is_named(loaded, name):
    case, keys, says = LOST[name]
    cfg = config.override(loaded(case).cfg, [f"model.{key}" for key in keys])
    with pytest.raises(ConfigError, match=says):
        export.family_for(cfg)
