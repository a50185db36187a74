"""Shapes, costs, initialisation and refusals of models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import models
from lcm.errors import ConfigError


def test_parameter_tree_is_plain_and_stacked(tiny):
    params = models.init(tiny("model.depth=3"), jax.random.key(0))
    shapes = jax.tree.map(lambda x: x.shape, params)
    assert type(params) is dict
    assert shapes["layers"]["0"]["mixer"] == {
        "q": (3, 32, 32),
        "k": (3, 32, 32),
        "v": (3, 32, 32),
        "out": (3, 32, 32),
    }
    assert shapes["layers"]["0"]["mlp"] == {
        "gate": (3, 32, 128),
        "up": (3, 32, 128),
        "down": (3, 128, 32),
    }
    assert set(shapes) == {"embedding", "final_norm", "layers"}


def test_layers_of_one_kind_start_different(tiny):
    q = models.init(tiny(), jax.random.key(0))["layers"]["0"]["mixer"]["q"]
    assert np.abs(q[0] - q[1]).max() > 0.1


def test_initialisation_keeps_variance_and_scales_with_depth(tiny):
    for depth in (2, 8):
        cfg = tiny("model.width=256", "model.heads=4", f"model.depth={depth}")
        params = models.init(cfg, jax.random.key(0))
        layer = params["layers"]["0"]
        assert np.std(layer["mixer"]["q"]) == pytest.approx(256**-0.5, rel=0.02)
        assert np.std(layer["mixer"]["out"]) == pytest.approx((256 * 2 * depth) ** -0.5, rel=0.02)
        hidden = layer["mlp"]["down"].shape[1]
        assert np.std(layer["mlp"]["down"]) == pytest.approx((hidden * 2 * depth) ** -0.5, rel=0.02)
        assert np.std(params["embedding"]["table"]) == pytest.approx(1 / 16, rel=0.02)


def test_fresh_loss_is_near_that_of_a_uniform_model(tiny):
    cfg = tiny("model.width=128", "model.heads=4", "model.depth=4")
    row = jax.random.randint(jax.random.key(1), (4, 32), 0, 256)
    logits, _ = models.apply(cfg, models.init(cfg, jax.random.key(0)), row[:, :-1])
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), row[:, 1:, None], -1)
    assert float(losses.mean()) == pytest.approx(np.log(cfg.model.vocab), abs=0.8)


def test_untied_head_and_gelu(tiny):
    cfg = tiny("model.tied=False", "model.mlp=gelu")
    params = models.init(cfg, jax.random.key(0))
    assert params["head"]["kernel"].shape == (32, 320)
    assert set(params["layers"]["0"]["mlp"]) == {"up", "down"}
    assert models.apply(cfg, params, jnp.zeros((1, 4), jnp.int32))[0].shape == (1, 4, 320)


def test_caps_bound_the_logits(tiny):
    cfg = tiny("model.logit_cap=0.01")
    params = models.init(cfg, jax.random.key(0))
    logits, _ = models.apply(cfg, params, jnp.arange(8)[None])
    assert 0 < np.abs(logits).max() <= 0.01


def test_parameters_by_hand(tiny):
    cfg = tiny("model.width=64", "model.heads=4", "model.kv_heads=2", "model.depth=3")
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192 + 2 * 64
    assert models.parameter_count(cfg) == 320 * 64 + 3 * layer + 64


def test_parameters_of_norms_and_biases_by_hand(tiny):
    keys = ["width=64", "heads=4", "kv_heads=2", "depth=3", "biases=all", "norm=layer"]
    keys += ["qk_norm=True", "post_norm=True", "embed_norm=True", "mlp=gelu"]
    cfg = tiny(*(f"model.{key}" for key in keys))
    matrices = 64 * 64 * 2 + 64 * 32 * 2 + 2 * 64 * 256
    biases, norms = 64 + 32 + 32 + 64 + 256 + 64, 4 * 2 * 64 + 2 * 16
    ends = 320 * 64 + 2 * 2 * 64
    assert models.parameter_count(cfg) == ends + 3 * (matrices + biases + norms)


def test_biases_by_name(tiny):
    def found(name: str, mlp: str) -> set[str]:
        cfg = tiny(f"model.biases={name}", f"model.mlp={mlp}")
        layer = models.init(cfg, jax.random.key(0))["layers"]["0"]
        names = (path.removesuffix("_bias") for part in layer.values() for path in part)
        kept = {name for part in layer.values() for name in part if name.endswith("_bias")}
        return {name for name in names if f"{name}_bias" in kept}

    assert found("none", "swiglu") == set()
    assert found("qkv", "swiglu") == {"q", "k", "v"}
    assert found("attention", "swiglu") == {"q", "k", "v", "out"}
    assert found("mlp", "gelu") == {"up", "down"}
    assert found("all", "geglu") == {"q", "k", "v", "out", "gate", "up", "down"}


def test_flops_count_the_matrices_of_each_mlp(tiny):
    flops = {
        mlp: models.flops_per_token(tiny("model.hidden=96", f"model.mlp={mlp}"), 8)
        for mlp in ("swiglu", "geglu", "gelu", "gelu_exact")
    }
    assert flops["swiglu"] == flops["geglu"]
    assert flops["gelu"] == flops["gelu_exact"]
    assert flops["geglu"] - flops["gelu"] == 6 * 2 * 32 * 96  # in two layers


def test_scores_are_scaled_as_asked(tiny):
    """1 / sqrt(K) said is 1 / sqrt(K) taken, and any other scale is another model."""
    params, row = models.init(tiny(), jax.random.key(0)), jnp.arange(8)[None]
    want, _ = models.apply(tiny(), params, row)
    same, _ = models.apply(tiny("model.score_scale=0.25"), params, row)
    other, _ = models.apply(tiny("model.score_scale=0.5"), params, row)
    np.testing.assert_array_equal(same, want)
    assert np.abs(other - want).max() > 1e-3


def test_flops_by_hand_and_by_xla(tiny):
    """6 per weight and token, plus 12 K H per visible key; XLA counts the same forward matmuls."""
    cfg = tiny("model.width=64", "model.heads=4", "model.depth=2", "model.unroll=2")
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 192) + 64 * 320
    length = 32
    visible = (length + 1) / 2
    want = 6 * weights + 2 * 12 * 64 * visible
    assert models.flops_per_token(cfg, length) == pytest.approx(want)
    windowed = tiny("model.width=64", "model.heads=4", "model.depth=2", "model.window=8")
    seen = np.mean([min(i + 1, 8) for i in range(length)])
    assert models.flops_per_token(windowed, length) == pytest.approx(6 * weights + 24 * 64 * seen)


def test_state_bytes_by_hand(tiny):
    cfg = tiny("model.width=64", "model.heads=4", "model.kv_heads=2", "model.depth=3")
    assert models.state_bytes_per_token(cfg) == 3 * (2 * 2 * 16 * 4 + 8)
    state = models.init_state(cfg, 1, 100)
    bytes_ = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) - 4 * (1 + 3)  # the counters
    assert bytes_ == 100 * models.state_bytes_per_token(cfg)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["model.heads=3"], "heads=3 does not divide model.width=32"),
        (["model.heads=4", "model.kv_heads=3"], "kv_heads=3 does not divide"),
        (["model.head_size=7"], "head_size=7 is odd"),
        (["model.width=33", "model.heads=1"], "head_size=33 is odd"),
        (["model.pattern=attention,mamba"], "names 'mamba'"),
        (["model.pattern=attention,attention,attention"], "3 kinds for model.depth=2"),
        (["model.dtype=float16"], "model.dtype='float16' is unknown"),
        (["model.depth=0"], "model.depth=0 must be at least 1"),
        (["model.biases=out"], "model.biases='out' is unknown: choose from none, qkv, attention"),
        (["model.norm=batch"], "model.norm='batch' is unknown: choose from rms, layer"),
        (["model.mlp=relu"], "model.mlp='relu' is unknown: choose from swiglu, geglu, geglu_exact"),
        (["model.score_scale=-1"], "model.score_scale=-1.0 is negative"),
        (["model.embed_scale=0"], "model.embed_scale=0.0 leaves nothing"),
        (["model.window=-1"], "model.window=-1 is negative"),
        (["model.positions=learned", "model.positions.length=31"], "length=31 is shorter"),
        (["model.positions=alibi+rope"], "ALiBi acts in attention"),
        (["model.positions.base=0.5"], "base=0.5 must be above 1"),
        (["model.kinds.odd.widht=3", "model.pattern=attention,odd"], "widht"),
    ],
)
def test_refusals_name_key_value_and_remedy(tiny, assignments, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        models.spec(tiny(*assignments))


def test_learned_table_refuses_what_it_cannot_place(tiny):
    cfg = tiny("model.positions=learned")
    params = models.init(cfg, jax.random.key(0))
    with pytest.raises(ConfigError, match="length 33 does not fit the learned table of 32"):
        models.apply(cfg, params, jnp.zeros((1, 33), jnp.int32))
    with pytest.raises(ConfigError, match="length 40"):
        models.init_state(cfg, 1, 40)


def test_full_state_is_refused_not_overwritten(tiny):
    cfg = tiny()
    params, state = models.init(cfg, jax.random.key(0)), models.init_state(cfg, 1, 8)
    _, state = models.apply(cfg, params, jnp.zeros((1, 6), jnp.int32), state=state)
    with pytest.raises(ValueError, match="3 tokens do not fit the state: 6 of its 8"):
        models.apply(cfg, params, jnp.zeros((1, 3), jnp.int32), state=state)
