"""Real processes on this machine: the same steps as one takes, on the same data."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import json, sys
import jax
process, count, port = map(int, sys.argv[1:])
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, process)
from lcm import config, models, parallel, training
from lcm.training import loop
cfg = config.shrink(config.base())
keys = ["data.packing=first_fit", "model.unroll=1", "mesh.data=2", "mesh.fsdp=2"]
cfg = config.override(cfg, keys)
mesh, rule, batches = parallel.make(cfg), training.optimizer(cfg.train), loop._batches(cfg)
losses, positions = [], []
with jax.set_mesh(mesh):
    layout = jax.tree.map(lambda x: x.sharding, training.abstract_state(cfg, mesh))
    begin = lambda key: training.init_state(models.spec(cfg), rule, key, cfg.train.ema)
    state = jax.jit(begin, out_shardings=layout)(jax.random.key(0))
    step = jax.jit(training.make_step(models.spec(cfg), rule, cfg), out_shardings=(layout, None))
    for _ in range(3):
        rows = parallel.put(next(batches), mesh)
        state, metrics = step(state, rows)
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
own = sum(shard.data.shape[0] for shard in rows.tokens_BL.addressable_shards)
print("RESULT", json.dumps([losses, own, str(batches.get_state())]))
"""


def run(count: int) -> list:
    """What each of so many processes, with four devices in all, finds."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={4 // count}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(process), str(count), str(port)],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]
    found = []
    for process in started:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]
        line = next(line for line in out.splitlines() if line.startswith("RESULT"))
        found.append(json.loads(line.removeprefix("RESULT")))
    return found


def test_two_processes_take_the_steps_of_one():
    """Losses, and the place in the data: a checkpoint of two is one that one can go on from."""
    (want, rows, place), (first, second) = run(1)[0], run(2)
    assert rows == 8
    for losses, own, data in (first, second):
        np.testing.assert_allclose(losses, want, rtol=2e-5)
        assert own == 4 and data == place
