"""Falcon-Mamba: norms inside without scales, and what is refused."""

import jax
import pytest

from lcm import config, models, pretrained
from lcm.errors import CheckpointError, ConfigError
from lcm.pretrained import Folder, assemble
from lcm.pretrained.assemble import read_config
from lcm.pretrained.families import family_of


def test_what_the_release_has():
    """Sizes of Falcon-Mamba 7B; the count is that of the hub's safetensors."""
    hf = {
        "model_type": "falcon_mamba",
        "hidden_size": 4096,
        "num_hidden_layers": 64,
        "vocab_size": 65024,
        "time_step_rank": 256,
        "tie_word_embeddings": False,
    }
    cfg = read_config(family_of(hf), hf)
    assert models.parameter_count(cfg) == 7_272_665_088
    assert cfg.model.options == "normed=True,scaled=False,eps=1e-06"


def test_its_norms_have_no_parameters(loaded):
    names = loaded("falcon_mamba").params["layers"]["0"]["mixer"].keys()
    assert not [name for name in names if name.endswith("norm")]
    assert {"dt_down", "bc", "A_log"} <= names


@pytest.mark.slow
def test_a_model_of_our_own_is_written_as_one(tmp_path):
    keys = ["pattern=mamba1", "mlp=none", "heads=1", "state=4", "positions=nope"]
    keys += ["options=normed=True,scaled=False", "norm_eps=1e-4", "recurrence_chunk=0"]
    cfg = config.override(config.shrink(config.base()), [f"model.{key}" for key in keys])
    model = pretrained.Model(cfg, models.init(cfg, jax.random.key(0)), None, 0)
    out = pretrained.save_folder(model, tmp_path / "out")
    source = Folder(out)
    assert source.config["model_type"] == "falcon_mamba"
    assert source.config["mixer_rms_eps"] == source.config["layer_norm_epsilon"] == 1e-4
    again = pretrained.load(out)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), model.params, again.params))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"use_bias": True}, "use_bias=True is not what the decoder has"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not what"),
        ({"mixer_rms_eps": None}, "mixer_rms_eps is missing"),
        ({"mixer_rms_eps": 2.0}, "eps=2.0 must lie from 0.0 to 1.0"),
    ],
)
def test_other_configs_are_refused(folder, keys, says):
    with pytest.raises(ConfigError) as error:
        assemble(Folder(folder("falcon_mamba", **keys)))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_another_rank_is_named(folder):
    with pytest.raises(CheckpointError, match=r"has shape \(13, 64\), .* asks for \(10, 64"):
        assemble(Folder(folder("falcon_mamba", time_step_rank=2)))


@pytest.mark.parametrize("options", ["scaled=False", "eps=0.1"])
def test_options_of_norms_that_are_not_there(options):
    keys = ["model.pattern=mamba1", f"model.options={options}"]
    cfg = config.override(config.shrink(config.base()), keys)
    with pytest.raises(ConfigError, match="are of norms that normed=False has not"):
        models.spec(cfg)
