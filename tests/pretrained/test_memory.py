"""How much is in memory while a model is read."""

import json
import pathlib
import subprocess
import sys

import pytest

from lcm import models
from lcm.pretrained.assemble import read_config
from lcm.pretrained.families import family_of
from lcm.pretrained.layout import layout, tensor_shapes

from . import cases

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = cases.model(
    "llama",
    hidden_size=768,
    intermediate_size=2304,
    num_hidden_layers=6,
    vocab_size=8000,
    rope_theta=1e4,
)
PROGRAM = """
import sys
import jax
from lcm.pretrained import Folder, assemble

def peak():  # of this program alone, where ru_maxrss would be of what started it too
    line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

jax.block_until_ready(jax.numpy.ones(8) + 1)
before = peak()
_, params = assemble(Folder(sys.argv[1]))
jax.block_until_ready(params)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print("RESULT", (peak() - before) / size, size)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="Linux counts it")
@pytest.mark.quick("bfloat16")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_reading_takes_little_more_than_the_parameters(tmp_path, dtype):
    family = family_of(CONFIG)
    spec = models.spec(read_config(family, CONFIG))
    folder = cases.write(tmp_path, CONFIG, tensor_shapes(layout(family, spec)), dtype)
    run = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    ratio, size = map(float, line.split()[1:])
    print(json.dumps({"dtype": dtype, "ratio": ratio, "bytes": size}))
    assert size > 200e6
    assert ratio < 1.3
