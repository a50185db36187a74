"""Parameters of encodings in a model: where they lie on a mesh, and in a file of weights."""

import jax
import numpy as np
import pytest
from cases import CHAINS, FIELDS, NAMES
from safetensors.numpy import load, save

from lcm import models, parallel, positions
from lcm.errors import ConfigError

# A model of eight positions in heads of eight, as in cases.py, with two kinds of layers.
SIZES = ("model.width=16", "model.depth=3", "model.heads=2", "data.length=8")
LEARNED = {"learned", "countdown", "clex", "t5", "kerple", "kerple_power", "fire", "cope"}
LEARNED |= {"head_scale", "aligned"}


def entry(name):
    first, plus, rest = name.partition("+")
    made = positions.make({"name": first, **FIELDS.get(first, {})})
    return positions.Chain(made, entry(rest)) if plus else made


def shapes(tiny, name):
    """The parameters of a model whose layers have the encoding and, every third, none."""
    cfg = tiny(*SIZES, "model.kinds.bare.positions=nope", "model.pattern=attention,attention,bare")
    with cfg.unlocked(), cfg.ignore_type():
        cfg.model.positions = positions.config(entry(name))
    return jax.eval_shape(lambda: models.init(cfg, jax.random.key(0)))


def of_positions(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {parallel.path(k): leaf for k, leaf in leaves if "positions" in parallel.path(k)}


@pytest.mark.parametrize("name", [*NAMES, *CHAINS])
def test_every_parameter_has_a_sharding_and_a_name(tiny, name):
    params = shapes(tiny, name)
    mesh = jax.make_mesh((1,) * len(parallel.AXES), parallel.AXES)
    where = parallel.shardings(params, mesh)
    own = of_positions(params)
    assert bool(own) == bool(LEARNED & {*name.split("+")})
    replicated = of_positions(where)
    assert all(replicated[key].is_fully_replicated for key in own)

    rng = np.random.default_rng(0)
    filled = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), params)
    leaves, tree = jax.tree_util.tree_flatten_with_path(filled)
    named = {parallel.path(keys, "."): leaf for keys, leaf in leaves}
    assert len(named) == len(leaves)  # no two share a name
    loaded = load(save(named))
    again = jax.tree.unflatten(tree, [loaded[parallel.path(keys, ".")] for keys, _ in leaves])
    jax.tree.map(np.testing.assert_array_equal, again, filled)
    assert all(
        a.dtype == b.dtype for a, b in zip(*map(jax.tree.leaves, (again, filled)), strict=True)
    )


def test_a_parameter_without_a_rule_is_refused():
    mesh = jax.make_mesh((1,) * len(parallel.AXES), parallel.AXES)
    with pytest.raises(ConfigError, match="no sharding rule for parameter layers/0/mixer/table"):
        parallel.shardings({"layers": {"0": {"mixer": {"table": np.zeros((2, 2))}}}}, mesh)
