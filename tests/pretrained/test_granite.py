"""Granite 4.0 without experts: factors, layers of one kind, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import config, models, pretrained
from lcm.errors import ConfigError
from lcm.pretrained import Folder, assemble
from lcm.pretrained.assemble import read_config
from lcm.pretrained.families import family_of

MICRO = {  # granite-4.0-h-micro
    "model_type": "granitemoehybrid",
    "vocab_size": 100_352,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "shared_intermediate_size": 8192,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 0,
    "mamba_n_heads": 64,
    "mamba_d_state": 128,
    "layer_types": ["attention" if n in (5, 15, 25, 35) else "mamba" for n in range(40)],
    "position_embedding_type": "nope",
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12,
    "residual_multiplier": 0.22,
    "logits_scaling": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
}


def test_what_a_release_has():
    spec = models.spec(read_config(family_of(MICRO), MICRO))
    assert [n for n, layer in enumerate(spec.in_order) if layer.attends] == [5, 15, 25, 35]
    assert (spec.embed_scale, spec.logit_divisor) == (12.0, 8.0)
    assert {layer.residual_scale for layer in spec.layers} == {0.22}
    assert spec.in_order[5].score_scale == 1 / 64  # of heads of 64, where 1/8 is usual
    assert (spec.layers[0].heads, spec.layers[0].head_size, spec.layers[0].hidden) == (64, 64, 8192)


def tiny(*keys: str):
    return config.override(config.shrink(config.base()), [f"model.{key}" for key in keys])


def test_factors_by_hand():
    """A model with factors is the plain one of weights that have them."""
    base = ["depth=1", "tied=False", "norm_eps=1e-5"]
    plain, scaled = tiny(*base), tiny(*base, "residual_scale=0.25", "logit_divisor=4")
    params, row = models.init(plain, jax.random.key(0)), jnp.arange(12)[None]
    layer = params["layers"]["0"]
    layer["mixer"]["out"] *= 4
    layer["mlp"]["down"] *= 4
    got, _ = models.apply(scaled, params, row)
    layer["mixer"]["out"] /= 4
    layer["mlp"]["down"] /= 4
    params["head"]["kernel"] /= 4
    want, _ = models.apply(plain, params, row)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.std(want) > 0.05


OWN = {
    "attention": ["positions=nope", "residual_scale=0.5"],
    "mamba": ["pattern=mamba2", "recurrence_chunk=0", "logit_divisor=3", "positions=nope"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_models_of_one_kind_of_layer_are_written_as_one(tmp_path, name):
    cfg = tiny("norm_eps=1e-4", *OWN[name])
    model = pretrained.Model(cfg, models.init(cfg, jax.random.key(0)), None, 0)
    out = pretrained.save_folder(model, tmp_path / "out")
    assert Folder(out).config["model_type"] == "granitemoehybrid"
    again = pretrained.load(out)
    jax.tree.map(np.testing.assert_array_equal, model.params, again.params)


REFUSED = {
    "experts": ({"num_local_experts": 4}, "num_local_experts=4: Granite is read without experts"),
    "said by nothing": ({"num_local_experts": None}, "num_local_experts is missing"),
    "biases": ({"attention_bias": True}, "attention_bias=True is not what the decoder has"),
    "kinds": ({"layer_types": ["moe"] * 3}, "layer_types names moe, which is none of mamba"),
    "count": ({"num_hidden_layers": 2}, "layer_types has 3 names for num_hidden_layers=2"),
    "factor": ({"logits_scaling": 0}, "logits_scaling=0 must be more than 0: 1 changes nothing"),
    "positions": ({"position_embedding_type": "alibi"}, "position_embedding_type='alibi' is not"),
    "steps": ({"time_step_limit": [0.0, 1.0]}, "time_step_limit=(0.0, 1.0) clips time steps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_configs_are_refused(folder, name):
    keys, says = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        assemble(Folder(folder("granite", **keys)))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("residual_scale=0", "model.residual_scale=0.0 must be more than 0"),
        ("logit_divisor=-1", "model.logit_divisor=-1.0 must be more than 0"),
    ],
)
def test_factors_that_leave_nothing(key, says):
    with pytest.raises(ConfigError, match=says):
        models.spec(tiny(key))
