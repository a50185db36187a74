"""Models read onto eight virtual devices."""

import json
import os
import pathlib
import subprocess
import sys

from . import cases
from .conftest import SHAPES

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from lcm import config, models, parallel
from lcm.pretrained import Folder, assemble

source, read = Folder(sys.argv[1]), []
stored = source.read
source.read = lambda name: (read.append(name), stored(name))[1]
cfg = config.override(config.base(), ["mesh.data=1", "mesh.fsdp=2", "mesh.tensor=4"])
mesh = parallel.make(cfg)
cfg, params = assemble(source, mesh=mesh)
assert sorted(read) == sorted(source.names())  # once each, whatever the number of devices
_, whole = assemble(source)
want = parallel.shardings(whole, mesh)
jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), params, whole)
assert jax.tree.all(jax.tree.map(lambda x, at: x.sharding == at, params, want))
q, bias = params["layers"]["0"]["mixer"]["q"], params["layers"]["0"]["mixer"]["q_bias"]
assert q.addressable_shards[0].data.shape == (2, 16, 8), q.addressable_shards[0].data.shape
assert bias.addressable_shards[0].data.shape == (2, 8)
row = jnp.arange(20)[None]
with mesh:
    got, _ = models.apply(cfg, params, row)
np.testing.assert_allclose(got, models.apply(cfg, whole, row)[0], rtol=1e-4, atol=1e-4)
print("RESULT", jax.device_count())
"""


def test_each_device_gets_its_shards(tmp_path):
    name = "llama, biases, tied"
    config = {**cases.CONFIGS[name], "vocab_size": 64}
    shapes = json.loads(json.dumps(SHAPES[name]).replace(str(cases.VOCAB), "64"))
    folder = cases.write(tmp_path, config, shapes)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "RESULT 8" in done.stdout
