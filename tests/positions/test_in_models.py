"""Any encoding in a model by one line of config; patterns of layers; placements by name."""

import jax
import jax.numpy as jnp
import pytest
from cases import FIELDS, NAMES

from lcm import config, models, positions
from lcm.parallel import path

ROOM = ("data.length=32", "model.width=32", "model.heads=2")


def shapes(cfg):
    """Parameters and logits as shapes: all that happens before compilation."""
    spec = models.spec(cfg)
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    where = models.default_context((2, 32))._replace(interval_BL=jnp.ones((2, 32)))
    params = jax.eval_shape(lambda key: models.decoder.init(spec, key), jax.random.key(0))
    run = lambda params, tokens: models.decoder.apply(spec, params, tokens, where, None)[0]  # noqa: E731
    return params, jax.eval_shape(run, params, tokens)


@pytest.mark.quick(
    "countdown", "rope", "clex", "self_extend", "t5", "fire", "head_scale", "chunked"
)
@pytest.mark.parametrize("name", NAMES)
def test_every_name_makes_a_model_with_its_defaults(name):
    needed = {
        "longrope": ["short=" + ",".join(["1.0"] * 8), "long=" + ",".join(["2.0"] * 8)],
        "rerope": ["window=16"],  # the defaults of these are for trained lengths of thousands
        "leaky_rerope": ["window=16"],
        "self_extend": ["window=16"],
        "reattention": [f"{k}={v}" for k, v in FIELDS["reattention"].items()],
    }
    fields = [f"model.positions.{field}" for field in needed.get(name, [])]
    cfg = config.override(config.base(), [*ROOM, f"model.positions={name}", *fields])
    params, logits = shapes(cfg)
    assert logits.shape == (2, 32, cfg.model.vocab)
    learned = [path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    encoding = positions.make(cfg.model.positions)
    has = bool(encoding.init(jax.random.key(0), models.spec(cfg).layers[0].dims)) or bool(
        encoding.init_layer(jax.random.key(0), models.spec(cfg).layers[0].dims)
    )
    assert any("positions/" in name for name in learned) == has


def test_an_encoding_inside_another_is_assigned_like_one(tiny):
    cfg = tiny(
        "model.positions=log_n+self_extend",
        "model.positions.second.window=8",
        "model.positions.second.rope=yarn",
        "model.positions.second.rope.factor=4",
    )
    made = models.spec(cfg).positions
    assert made.second.rope == positions.YaRN(factor=4.0, original=32)
    assert made.first == positions.LogN(original=32)
    assert positions.config(positions.make(cfg.model.positions)) == cfg.model.positions.to_dict()


@pytest.mark.parametrize("name", ["irope", "rnope_swa", "smollm3"])
def test_patterns_of_layers_are_configs(name):
    cfg = config.load(f"configs/interleaved.py:{name},tiny")
    near, *_, bare = models.spec(cfg).layers
    assert isinstance(near.positions.second if name == "irope" else near.positions, positions.RoPE)
    rotates = bare.positions.second if name == "irope" else bare.positions
    assert isinstance(rotates, positions.NoPE)
    assert (near.window, bare.window) == ((128, 0) if name == "rnope_swa" else (0, 0))
    shapes(cfg)


@pytest.mark.parametrize("name", list(positions.PLACEMENTS))
def test_placements_round_trip(name):
    placement = positions.PLACEMENTS[name]()
    assert positions.make_placement(positions.placement_config(placement)) == placement
    cfg = config.override(config.base(), [f"train.placement={name}"])
    assert positions.make_placement(cfg.train.placement) == placement
