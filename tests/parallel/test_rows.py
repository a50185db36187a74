"""Rows of all processes together are the stream of one, whatever their number and restarts."""

from programs import result, start

# Eight devices, dealt out to as many processes as asked for: what each would put on its own.
PROGRAM = """
import itertools, json
import jax, numpy as np
from hypothesis import given, settings, strategies as st
from lcm import config, parallel
from lcm.training import loop

keys = ["train.batch=8", "data.packing=first_fit", "data.packing_bins=16", "data.source=stdlib"]
cfg = config.override(config.shrink(config.base()), keys)
stream = loop._batches(cfg)
want = [np.asarray(next(stream).tokens_BL) for _ in range(12)]
sizes = [s for s in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(s) == 8]
sizes = [s for s in sizes if s[3] <= 2]
starts = st.lists(
    st.tuples(st.sampled_from(sizes), st.sampled_from((1, 2, 4, 8)), st.integers(1, 4)),
    min_size=2, max_size=3,
)
tried, part = 0, 0

@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(starts)
def check(starts):
    global tried, part
    state, found = None, []
    for axes, processes, steps in starts:
        for axis, size in zip(parallel.AXES, axes):
            cfg.mesh[axis] = size
        mesh = parallel.make(cfg)
        batches = loop._batches(cfg)  # of a process that begins, and knows the checkpoint alone
        if state is not None:
            batches.set_state(json.loads(state))
        for _ in range(steps):
            placed = parallel.put(next(batches), mesh).tokens_BL
            whole = np.full(placed.shape, -1)
            for process in range(processes):
                own = np.full(placed.shape, -1)
                for shard in placed.addressable_shards:
                    if shard.device.id * processes // 8 == process:
                        own[shard.index] = shard.data
                part += bool((own == -1).any())
                both = (own != -1) & (whole != -1)  # replicas, which must agree
                assert (own[both] == whole[both]).all()
                whole[own != -1] = own[own != -1]
            found.append(whole)
        state = json.dumps(batches.get_state())
    tried += 1
    for got, expected in zip(found, want):
        np.testing.assert_array_equal(got, expected)

check()
print("RESULT", json.dumps([tried, part, len({row.tobytes() for batch in want for row in batch})]))
"""


def test_rows_of_all_processes_are_the_stream_of_one_across_restarts():
    tried, part, rows = result(start("-c", PROGRAM, devices=8))
    assert tried >= 12 and part > tried  # processes had a part each, not everything
    assert rows == 12 * 8  # none twice
