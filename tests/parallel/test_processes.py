"""Real processes on this machine: the same steps as one takes, on the same data."""

import numpy as np
from programs import free_port, result, start

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
    port = str(free_port())
    programs = [
        start("-c", PROGRAM, str(process), str(count), port, devices=4 // count)
        for process in range(count)
    ]
    return [result(program, timeout=300) for program in programs]


def test_two_processes_take_the_steps_of_one():
    """Losses, and the place in the data: a checkpoint of two is one that one can go on from."""
    (want, rows, place), (first, second) = run(1)[0], run(2)
    assert rows == 8
    for losses, own, data in (first, second):
        np.testing.assert_allclose(losses, want, rtol=2e-5)
        assert own == 4 and data == place
