"""Bamba: what its release has, and what is refused."""

import pytest

from lcm import models
from lcm.errors import ConfigError
from lcm.pretrained import Folder, assemble
from lcm.pretrained.assemble import read_config
from lcm.pretrained.families import family_of


def test_what_the_release_has():
    """Sizes of Bamba 9B, which transformers takes where the config is silent."""
    hf = {
        "model_type": "bamba",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "mamba_d_state": 128,
        "attn_layer_indices": [9, 18, 27],
    }
    spec = models.spec(read_config(family_of(hf), hf))
    assert [n for n, layer in enumerate(spec.in_order) if layer.attends] == [9, 18, 27]
    attention, mamba = spec.in_order[9], spec.in_order[0]
    assert attention.positions.fraction == 0.5 and attention.kv_heads == 8
    assert (mamba.heads, mamba.head_size, mamba.groups, mamba.conv) == (128, 64, 1, 4)


INFINITE = {"__float__": "Infinity"}
FEWER = {"__float__": "10.0"}
REFUSED = {
    "one kind": (
        {"attn_layer_indices": None},
        "attn_layer_indices=[] of num_hidden_layers=3 makes",
    ),
    "all attend": ({"attn_layer_indices": [0, 1, 2]}, "makes all layers full, Bamba has layers of"),
    "biases": ({"attention_bias": True}, "attention_bias=True is not what the decoder has"),
    "projections": ({"mamba_proj_bias": True}, "mamba_proj_bias=True is not what"),
    "taps": ({"mamba_conv_bias": False}, "mamba_conv_bias=False is not what"),
    "steps": ({"time_step_limit": [0.0, FEWER]}, "time_step_limit=(0.0, 10.0) clips time steps"),
    "least": ({"time_step_limit": [0.1, INFINITE]}, "time_step_limit=(0.1, inf) clips time steps"),
    "heads": ({"mamba_d_head": 9}, "mamba_n_heads=8 times mamba_d_head=9 is not mamba_expand *"),
    "no divisor": ({"mamba_n_heads": 7}, "heads=7 does not divide 64 channels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_configs_are_refused(folder, name):
    keys, says = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        assemble(Folder(folder("bamba", **keys)))
    assert says in str(error.value) and "\n" not in str(error.value)
