"""Logits of every family as transformers has them: by golden values, and live where torch is."""

import json

import cases
import jax.numpy as jnp
import make_golden
import numpy as np
import pytest

from lcm import models
from lcm.pretrained import Folder, assemble

GOLDEN = np.load(make_golden.FOLDER / "logits.npz")
SHAPES = json.loads((make_golden.FOLDER / "shapes.json").read_text())
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Config and parameters of a case, read from a folder with the tensors transformers saves."""
    made = {}

    def load(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp("model")
            made[name] = assemble(Folder(cases.write(folder, cases.CONFIGS[name], SHAPES[name])))
        return made[name]

    return load


@pytest.mark.parametrize("name", cases.CONFIGS)
def test_logits_are_those_of_transformers(loaded, name):
    cfg, params = loaded(name)
    models.check_params(cfg, params)
    got, _ = models.apply(cfg, params, jnp.asarray(cases.tokens()))
    assert np.std(GOLDEN[name]) > 0.2
    np.testing.assert_allclose(got[:, make_golden.PLACES], GOLDEN[name], **CLOSE)


# One of each kind of layer.
CACHED = ("llama, llama3", "mistral", "qwen2", "gemma3", "gpt_neox", "bloom")


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_changes_nothing(loaded, name):
    """The first tokens in one chunk, the next one by one, the rest in another chunk."""
    cfg, params = loaded(name)
    row, state, got, start = jnp.asarray(cases.tokens()), None, [], 0
    state = models.init_state(cfg, 2, cases.LENGTH)
    for size in (16, 1, 1, 1, 1, 1, 1, 1, 1, 16):
        some, state = models.apply(cfg, params, row[:, start : start + size], state=state)
        got.append(some)
        start += size
    assert start == cases.LENGTH
    got = np.concatenate(got, 1)[:, make_golden.PLACES]
    np.testing.assert_allclose(got, GOLDEN[name], **CLOSE)


@pytest.mark.parametrize("name", cases.CONFIGS)
def test_live_transformers_agree(loaded, name):
    """With the release that is installed; shorter too where that is not the whole cut short."""
    pytest.importorskip("torch", reason="transformers computes with torch: golden values only")
    pytest.importorskip("transformers")
    reference, (cfg, params) = make_golden.reference(name), loaded(name)
    for length in (cases.LENGTH, *([cases.SHORT] if name in cases.BY_LENGTH else [])):
        row = cases.tokens(length)
        got, _ = models.apply(cfg, params, jnp.asarray(row))
        np.testing.assert_allclose(got, make_golden.logits(reference, row), **CLOSE)
