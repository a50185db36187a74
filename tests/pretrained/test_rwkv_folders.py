"""Folders of RWKV-4, 6 and 7: logits of RWKV's own package, with and without a state, written and
read."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcm import models, pretrained
from lcm.errors import CheckpointError, ConfigError
from lcm.pretrained.assemble import read_config
from lcm.pretrained.families import family_of

from . import cases, make_rwkv_golden

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=make_rwkv_golden.TINY)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def golden(name):
    return np.load(make_rwkv_golden.FOLDER / f"{name}.npz")["logits"]


@pytest.fixture(scope="module")
def loaded(name, tmp_path_factory):
    return pretrained.load(folder(tmp_path_factory.mktemp(name), name))


def folder(at, name, **keys):
    tiny = make_rwkv_golden.TINY[name]
    return cases.write(at, {**tiny.config, **keys}, tiny.shapes())


def test_logits_are_those_of_its_own_package(loaded, golden):
    got, _ = models.apply(loaded.cfg, loaded.params, jnp.asarray(cases.tokens()))
    assert np.std(golden) > 0.2
    np.testing.assert_allclose(got, golden, **CLOSE)


@pytest.mark.slow
def test_a_state_changes_nothing(loaded, golden):
    cfg, params, row = loaded.cfg, loaded.params, jnp.asarray(cases.tokens())
    state, got, start = models.init_state(cfg, 2, cases.LENGTH), [], 0
    for size in (16, 1, 1, 6, 16):
        some, state = models.apply(cfg, params, row[:, start : start + size], state=state)
        got.append(some)
        start += size
    np.testing.assert_allclose(np.concatenate(got, 1), golden, **CLOSE)


def test_what_is_exported_is_the_model(loaded, tmp_path):
    pretrained.save_folder(loaded, tmp_path / "out")
    again = pretrained.load(tmp_path / "out")
    row = jnp.asarray(cases.tokens())
    want, _ = models.apply(loaded.cfg, loaded.params, row)
    got, _ = models.apply(again.cfg, again.params, row)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("name", "keys", "match"),
    [
        ("rwkv4", {"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ("rwkv4", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 is not"),
        ("rwkv6", {"head_size": 32}, "head_size=32"),
        (
            "rwkv6",
            {"hidden_size": 96, "attention_hidden_size": 96},
            "hidden_size=96 is no multiple",
        ),
        ("rwkv6", {"attention_hidden_size": 256}, "attention_hidden_size=256"),
        ("rwkv7", {"head_dim": 32}, "head_dim=32"),
        ("rwkv7", {"hidden_size": 96}, "hidden_size=96 is no multiple"),
        ("rwkv7", {"value_dim": [128, 256, 256]}, "value_dim"),
        ("rwkv7", {"attn": {"layers": [1]}}, "attn="),
    ],
)
def test_another_shape_is_refused(tmp_path, name, keys, match):
    with pytest.raises(ConfigError, match=match):
        pretrained.load(folder(tmp_path, name, **keys))


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (
            {"attention_hidden_size": 64},
            r"time_decay has shape \(128,\), config.json asks",
        ),
        (
            {"intermediate_size": None},
            r"key.weight has shape \(96, 128\), .* \(512, 128",
        ),
        ({"num_hidden_layers": 4}, r"rwkv.blocks.3.* is missing"),
        ({"num_hidden_layers": 2}, r"tensors have no place in the model, rwkv.blocks.2"),
    ],
)
def test_tensors_of_another_config_are_refused(tmp_path, keys, match):
    with pytest.raises(CheckpointError, match=match) as error:
        pretrained.load(folder(tmp_path, "rwkv4", **keys))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("width", "depth", "millions"), [(768, 12, 169), (1024, 24, 430)])
def test_releases_of_rwkv_4_have_the_parameters_of_their_names(width, depth, millions):
    """`rwkv-4-169m-pile` and `rwkv-4-430m-pile`."""
    sizes = {"hidden_size": width, "attention_hidden_size": width, "intermediate_size": 4 * width}
    hf = {**make_rwkv_golden.CONFIG_OF_4, **sizes, "num_hidden_layers": depth, "vocab_size": 50277}
    cfg = read_config(family_of(hf), hf)
    assert models.parameter_count(cfg) // 10**6 == millions
