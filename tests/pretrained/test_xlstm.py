"""xLSTM-7B: sizes in factors of a width, the kernels of transformers, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import config, models, pretrained
from lcm.errors import ConfigError
from lcm.pretrained import Folder, assemble
from lcm.pretrained.assemble import read_config
from lcm.pretrained.families import family_of, xlstm

from . import cases, make_golden


def test_what_the_release_has():
    """Sizes of xLSTM-7B, which transformers takes where the config is silent."""
    hf = {"model_type": "xlstm"}
    cfg = read_config(family_of(hf), hf)
    layer = models.spec(cfg).layers[0]
    assert (layer.heads, layer.state, layer.head_size, layer.hidden) == (8, 256, 512, 10_944)
    matrices = 4096 * (2 * 2048 + 3 * 4096 + 3 * 10_944)
    gates, norms = 2 * (4096 * 8 + 8), 3 * 4096
    ends = 2 * 50_304 * 4096 + 4096
    assert models.parameter_count(cfg) == ends + 32 * (matrices + gates + norms)


@pytest.mark.slow
def test_chunks_of_transformers_agree(loaded, monkeypatch):
    """Two chunks and a rest: longer texts are not read token by token there."""
    pytest.importorskip("torch", reason="transformers computes with torch")
    pytest.importorskip("transformers")
    chunks = {"chunk_size": 16, "autocast_kernel_dtype": "float32"}
    monkeypatch.setitem(cases.CONFIGS, "xlstm", {**cases.CONFIGS["xlstm"], **chunks})
    (cfg, params, *_), row = loaded("xlstm"), cases.tokens()
    want = make_golden.logits(make_golden.reference("xlstm"), row)
    got, _ = models.apply(cfg, params, jnp.asarray(row))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_every_size_comes_back():
    """Though a product of floats may lie below the whole number, which is then cut."""
    cut = 0
    for width in range(1, 200):
        for channels in range(1, 2 * width, 7):
            assert int(width * xlstm._factor(channels, width)) == channels
            cut += int(width * (channels / width)) != channels
    assert cut > 0


@pytest.mark.slow
def test_a_model_of_our_own_is_written_as_one(tmp_path):
    keys = ["pattern=mlstm", "heads=2", "state=12", "expand=1.25", "hidden=44", "positions=nope"]
    keys += ["tied=False", "logit_cap=30", "recurrence_chunk=0", "norm_eps=1e-4"]
    cfg = config.override(config.shrink(config.base()), [f"model.{key}" for key in keys])
    model = pretrained.Model(cfg, models.init(cfg, jax.random.key(0)), None, 0)
    out = pretrained.save_folder(model, tmp_path / "out")
    assert Folder(out).config["model_type"] == "xlstm"
    again = pretrained.load(out)
    assert models.spec(again.cfg).layers[0].hidden == 44
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), model.params, again.params))


REFUSED = {
    "biases": ({"use_bias": True}, "use_bias=True is not what the decoder has"),
    "no last norm": ({"add_out_norm": False}, "add_out_norm=False is not what"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not what"),
    "fused": ({"weight_mode": "fused"}, "weight_mode='fused' is not what the decoder has"),
    "eps": ({"eps": 1e-3}, "eps=0.001 is not what the decoder has: it has 1e-06"),
    "width": ({"embedding_dim": 16}, "embedding_dim=16 is not hidden_size=32"),
    "depth": ({"num_blocks": 3}, "num_blocks=3 is not num_hidden_layers=2"),
    "keys": ({"qk_dim_factor": 0.45}, "qk_dim_factor=0.45 gives 14 channels for num_heads=4"),
    "steps": ({"ffn_round_up_to_multiple_of": 0}, "ffn_round_up_to_multiple_of=0 must be 1 or"),
    "gates": ({"gate_soft_cap": 0.0}, "gate_soft_cap=0.0 must be more than 0"),
    "logits": ({"output_logit_soft_cap": -1.0}, "output_logit_soft_cap=-1.0 must be more"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_configs_are_refused(folder, name):
    keys, says = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        assemble(Folder(folder("xlstm", **keys)))
    assert says in str(error.value) and "\n" not in str(error.value)
