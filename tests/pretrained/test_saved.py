"""Folders as `save_pretrained` of transformers writes them, config and all."""

import jax
import numpy as np
import pytest

from lcm import models, pretrained
from lcm.pretrained import Folder, assemble

from . import make_golden

NAMES = ("mamba2", "bamba", "granite", "olmo_hybrid", "falcon_mamba", "xlstm", "lfm2_moe")


@pytest.mark.quick("bamba")
@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_saves_is_the_model(loaded, tmp_path, name):
    pytest.importorskip("torch", reason="transformers computes with torch")
    pytest.importorskip("transformers")
    make_golden.reference(name).save_pretrained(tmp_path / "model")
    model, want = pretrained.load(tmp_path / "model"), loaded(name)
    assert models.spec(model.cfg) == models.spec(want.cfg)
    assert jax.tree.structure(model.params) == jax.tree.structure(want.params)
    jax.tree.map(np.testing.assert_array_equal, model.params, want.params)


def test_infinity_as_transformers_writes_it(folder):
    """JSON has none: the newest releases write a dict in its place."""
    limit = [0.0, {"__float__": "Infinity"}]
    cfg, _ = assemble(Folder(folder("mamba2", time_step_limit=limit)))
    assert cfg.model.pattern == ("mamba2",)
