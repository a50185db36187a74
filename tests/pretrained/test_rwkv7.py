"""A folder of RWKV-7: logits of RWKV's own package, with and without a state, written and read."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcm import models, pretrained
from lcm.errors import ConfigError

from . import cases, make_rwkv_golden

GOLDEN = np.load(make_rwkv_golden.FOLDER / "rwkv7.npz")["logits"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("rwkv7")
    return cases.write(at, make_rwkv_golden.CONFIG, make_rwkv_golden.shapes())


@pytest.fixture(scope="module")
def loaded(folder):
    return pretrained.load(folder)


def test_logits_are_those_of_its_own_package(loaded):
    got, _ = models.apply(loaded.cfg, loaded.params, jnp.asarray(cases.tokens()))
    assert np.std(GOLDEN) > 0.2
    np.testing.assert_allclose(got, GOLDEN, **CLOSE)


@pytest.mark.slow
def test_a_state_changes_nothing(loaded):
    cfg, params, row = loaded.cfg, loaded.params, jnp.asarray(cases.tokens())
    state, got, start = models.init_state(cfg, 2, cases.LENGTH), [], 0
    for size in (16, 1, 1, 6, 16):
        some, state = models.apply(cfg, params, row[:, start : start + size], state=state)
        got.append(some)
        start += size
    np.testing.assert_allclose(np.concatenate(got, 1), GOLDEN, **CLOSE)


def test_what_is_exported_is_the_model(loaded, tmp_path):
    pretrained.save_folder(loaded, tmp_path / "out")
    again = pretrained.load(tmp_path / "out")
    row = jnp.asarray(cases.tokens())
    want, _ = models.apply(loaded.cfg, loaded.params, row)
    got, _ = models.apply(again.cfg, again.params, row)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"head_dim": 32}, "head_dim=32"),
        ({"hidden_size": 96}, "hidden_size=96 is no multiple"),
        ({"value_dim": [128, 256, 256]}, "value_dim"),
        ({"attn": {"layers": [1]}}, "attn="),
    ],
)
def test_another_shape_is_refused(tmp_path, keys, match):
    config = {**make_rwkv_golden.CONFIG, **keys}
    with pytest.raises(ConfigError, match=match):
        pretrained.load(cases.write(tmp_path, config, make_rwkv_golden.shapes()))
