"""The same config on one device and on eight virtual ones, and what a mesh refuses."""

import json
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from programs import result, start

from lcm import models, parallel, training
from lcm.errors import ConfigError

MESHES = {"data": [8, 1, 1, 1], "context": [1, 1, 8, 1], "fsdp, tensor": [1, 2, 1, 4]}
PROGRAM = """
import json, sys
import jax
from lcm import config, training
from lcm.training import scores
scores.LOGITS = int(sys.argv[3])
cfg = config.shrink(config.base())
keys = ["train.steps=4", "train.log_every=1", "model.width=64", "model.heads=4", "model.unroll=1"]
cfg = config.override(cfg, keys + ["data.packing=first_fit"])
out = {}
for name, sizes in json.loads(sys.argv[2]).items():
    for axis, size in zip(("data", "fsdp", "context", "tensor"), sizes):
        cfg.mesh[axis] = size
    folder = f"{sys.argv[1]}/{len(out)}"
    training.train(cfg, folder)
    lines = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
    out[name] = [[line["loss"], line["grad_norm"]] for line in lines]
print("RESULT", json.dumps([jax.device_count(), out]))
"""


def losses(folder: pathlib.Path, devices: int, meshes: dict, logits: int) -> dict:
    program = start("-c", PROGRAM, str(folder), json.dumps(meshes), str(logits), devices=devices)
    count, found = result(program)
    assert count == devices
    return found


def are_those_of_one(folder: pathlib.Path, meshes: dict, logits: int) -> None:
    want = losses(folder / "one", 1, {"one": [1, 1, 1, 1]}, 2**27)["one"]
    assert len(want) == 4
    for name, values in losses(folder / "eight", 8, meshes, logits).items():
        np.testing.assert_allclose(values, want, rtol=2e-4, err_msg=name)


def test_one_and_eight_devices_give_the_same_losses(tmp_path):
    """Logits of few tokens at a time: two of each device's rows, and of its part."""
    are_those_of_one(tmp_path, {"all": [1, 2, 2, 2]}, logits=2000)


@pytest.mark.slow
def test_one_row_of_a_device_at_a_time_gives_the_same_losses(tmp_path):
    are_those_of_one(tmp_path, {"data": [8, 1, 1, 1]}, logits=2000)


@pytest.mark.slow
def test_other_meshes_give_the_same_losses(tmp_path):
    are_those_of_one(tmp_path, MESHES, logits=2**27)


def test_every_parameter_and_moment_has_a_rule(tiny):
    cfg = tiny("model.positions=learned", "model.tied=False", "train.ema=0.9")
    mesh = parallel.make(cfg, jax.devices()[:1])
    layout = training.abstract_state(cfg, mesh)
    specs = {parallel.path(k): leaf.sharding.spec for k, leaf in jax.tree.leaves_with_path(layout)}
    mixer = PartitionSpec(None, "fsdp", "tensor")
    assert specs["params/layers/0/mixer/q"] == mixer
    assert specs["average/layers/0/mixer/q"] == mixer
    moments = [spec for name, spec in specs.items() if name.endswith("mu/layers/0/mixer/q")]
    assert moments == [mixer]
    assert specs["params/positions/model/table"] == PartitionSpec()


def test_every_part_of_a_layer_has_a_rule(tiny):
    keys = ["norm=layer", "biases=all", "qk_norm=True", "post_norm=True", "embed_norm=True"]
    cfg = tiny(*(f"model.{key}" for key in keys), "train.optimizer=muon")
    layout = training.abstract_state(cfg, parallel.make(cfg, jax.devices()[:1]))
    specs = {parallel.path(k): leaf.sharding.spec for k, leaf in jax.tree.leaves_with_path(layout)}
    layer = "params/layers/0"
    assert specs[f"{layer}/mixer/k_bias"] == PartitionSpec(None, "tensor")
    assert specs[f"{layer}/mlp/gate_bias"] == PartitionSpec(None, "tensor")
    whole = ["mixer/out_bias", "mlp/down_bias", "mixer/q_norm/scale", "mlp_post_norm/bias"]
    for name in (*(f"{layer}/{name}" for name in whole), "params/embedding/norm/bias"):
        assert specs[name] == PartitionSpec(), name


def test_parameter_without_a_rule_is_named(tiny):
    mesh = parallel.make(tiny(), jax.devices()[:1])
    leaf = jax.ShapeDtypeStruct((3, 4), "float32")
    with pytest.raises(ConfigError, match=r"no sharding rule for parameter layers/0/mixer/novel"):
        parallel.shardings({"layers": {"0": {"mixer": {"novel": leaf}}}}, mesh)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["mesh.data=3"], "does not cover 8 devices"),
        (["mesh.data=-1", "mesh.fsdp=-1"], "at most one is -1"),
        (["mesh.data=-1", "mesh.fsdp=3"], "data is what is left, and the others, 3 together, must"),
        (["train.batch=12"], "train.batch=12 is not divisible by 8"),
        (["train.batch=8", "train.accumulate=2"], "not divisible by 16"),
        (["train.accumulate=3"], "train.batch=8 is not a multiple of train.accumulate=3"),
        (["mesh.context=8", "data.length=36"], "data.length=36 is not divisible by mesh.context=8"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(tiny, assignments, message):
    devices = [jax.devices()[0]] * 8
    with pytest.raises(ConfigError, match=message):
        parallel.make(tiny(*assignments), devices)


def test_size_that_an_axis_does_not_divide_is_named(tiny):
    cfg = tiny("model.vocab=321")
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 2), parallel.AXES)
    shapes = jax.eval_shape(lambda k: models.decoder.init(models.spec(cfg), k), jax.random.key(0))
    with pytest.raises(
        ConfigError, match=r"embedding/table \(321, 32\) is not divisible by mesh.tensor=2"
    ):
        parallel.shardings(shapes, mesh)
