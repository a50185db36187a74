"""The bisection against a sort, whole and with the vocabulary on two devices."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm.decoding.threshold import threshold

ROOT = pathlib.Path(__file__).parents[2]
search = jax.jit(threshold)


def by_sorting(key, weight, target):
    for value in np.unique(key)[::-1]:
        if weight[key >= value].sum() >= target:
            return value
    return -np.inf


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
keys = st.one_of(finite, st.sampled_from([0.0, -0.0, -np.inf, np.inf, 1.0, 2.0]))


@settings(deadline=None)
@given(st.lists(st.tuples(keys, st.integers(0, 4)), min_size=6, max_size=6), st.integers(1, 25))
def test_equals_a_sort(entries, target):
    key, weight = (np.array(values, np.float32) for values in zip(*entries, strict=True))
    key[np.abs(key) < np.finfo(np.float32).tiny] = 0  # XLA has no smaller numbers
    got = search(key[None], weight[None], jnp.array([target], jnp.float32))
    assert np.asarray(got)[0] == by_sorting(key, weight, target)


@pytest.mark.parametrize("p", [1 / 1024, 0.25, 0.25 + 1e-6, 0.5, 0.9, 1 - 1e-6, 1.0])
def test_uniform_weights_keep_the_ceiling(p):
    key = np.random.default_rng(0).permutation(1024).astype(np.float32)[None]
    t = search(key, np.full((1, 1024), 1 / 1024, np.float32), jnp.array([p], jnp.float32))
    assert (key >= np.asarray(t)[:, None]).sum() == np.ceil(np.float32(p) * 1024)


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from lcm.decoding import Sampling, begin, chain, keys, observe, plan, sample
from lcm.decoding.threshold import threshold

assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
over_vocabulary = NamedSharding(mesh, PartitionSpec(None, "tensor"))
whole = NamedSharding(mesh, PartitionSpec())
place = lambda tree: jax.tree.map(
    lambda x: jax.device_put(x, over_vocabulary if x.shape[1:] == (VOCAB,) else whole), tree)

VOCAB = 256
key = np.random.default_rng(0).normal(size=(3, VOCAB)).astype(np.float32)
weight = np.random.default_rng(1).integers(0, 5, (3, VOCAB)).astype(np.float32)
target = np.array([1.0, 100.0, 500.0], np.float32)
search = jax.jit(threshold)
sharded = search.lower(*place((key, weight, target))).compile()
np.testing.assert_array_equal(sharded(*place((key, weight, target))), search(key, weight, target))
text = sharded.as_text()
assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text

settings = [
    Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3, seed=1),
    Sampling(typical_p=0.8, eta=1e-3, epsilon=1e-3, stop_ids=(3,), min_new_tokens=2, seed=2),
    Sampling(temperature=0, no_repeat_ngram=2, repetition_penalty=1.2, repetition_window=4),
]
shape = plan(settings, VOCAB, 32)

@jax.jit
def step(chain_, key_R, history, logits_RV):
    history, drawn = sample(chain_, key_R, history, logits_RV)
    return observe(history, drawn.token_R, jnp.ones(3, bool)), drawn

rows = chain(settings, shape), keys(settings, shape)
history = begin(settings, [[1, 2, 3], [4], [5, 6, 5]], shape)
rows2, history2 = place(rows), place(history)
for number in range(8):
    logits = jax.random.normal(jax.random.key(number), (3, VOCAB)) * 3
    history, drawn = step(*rows, history, logits)
    history2, drawn2 = step(*rows2, history2, place(logits))
    np.testing.assert_array_equal(drawn.token_R, drawn2.token_R)
    np.testing.assert_allclose(drawn.logprob_R, drawn2.logprob_R, atol=1e-5)
jax.tree.map(np.testing.assert_array_equal, history, history2)
print("RESULT the same")
"""


def test_two_devices_find_what_one_does():
    """Every processor and the draw with the vocabulary in two halves; the search gathers none."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "RESULT the same" in done.stdout
