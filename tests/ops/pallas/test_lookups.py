"""Score modifications that look up a table by position, through kernels run as plain JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import arrays, both, close, rows, run

from lcm.ops.attention import LinearBias, Part, causal, compose, pallas, window
from lcm.ops.attention.lookup import LARGEST, lookup
from lcm.ops.attention.modification import Modification
from lcm.types import Array

pytestmark = pytest.mark.usefixtures("interpreted")


def modification(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@modification
class Buckets:
    """T5 (arXiv:1910.10683): 32 buckets, half of them for single distances, others by log."""

    table_NH: Array

    def __call__(self, score, q_pos, k_pos, head):
        count, far = self.table_NH.shape[0] // 2, 128
        distance = jnp.maximum(q_pos - k_pos, 0)
        ratio = jnp.log(jnp.maximum(distance, 1) / count) / np.log(far / count)
        large = jnp.minimum(count + (ratio * count).astype(jnp.int32), 2 * count - 1)
        return score + self.table_NH[jnp.where(distance < count, distance, large), head]


@modification
class ByDistance:
    """A factor for each distance and head, made of parameters; the last is for all beyond."""

    logs_HN: Array

    def __call__(self, score, q_pos, k_pos, head):
        last = self.logs_HN.shape[1] - 1
        return score * jnp.exp(self.logs_HN)[head, jnp.clip(q_pos - k_pos, 0, last)]


@modification
class Filled:
    """Beyond the end it is NaN, which is left out."""

    table_HN: Array

    def __call__(self, score, q_pos, k_pos, head):
        found = self.table_HN.at[head, q_pos - k_pos].get(mode="fill")
        return score + jnp.where(q_pos - k_pos < self.table_HN.shape[1], found, 0.0)


@modification
class Pairs:
    """By two positions, for all heads; and by the position of the query alone."""

    table_NM: Array
    temperature_N: Array

    def __call__(self, score, q_pos, k_pos, head):
        score = score * self.temperature_N[q_pos // 8]
        return score + self.table_NM[q_pos // 64, k_pos % 7]


def table(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


MODS = {
    "t5": lambda heads: Buckets(table(32, heads)),
    "by distance": lambda heads: ByDistance(table(heads, LARGEST) / 4),
    "filled": lambda heads: Filled(table(heads, 40)),
    "pairs": lambda heads: Pairs(table(5, 7), table(40, seed=1)),
    "composed": lambda heads: compose(
        ByDistance(table(heads, 130) / 4), LinearBias(table(heads)), Buckets(table(32, heads))
    ),
}


def parts(q, k, v, mod):
    return [Part(q, k, causal(), mod)], v


@pytest.mark.quick("composed")
@pytest.mark.parametrize("name", MODS)
def test_values_and_gradients_on_packed_rows(name):
    where = rows((150, 80, 40), (290,), total=300)
    given = (*arrays(300, 300, 4, 2), MODS[name](4))
    found, expected = both(parts, given, where, where)
    close(jax.tree.leaves(found), jax.tree.leaves(expected), 2e-5)
    assert all(np.asarray(d).any() for d in jax.tree.leaves(expected))


def test_bfloat16_and_tables_of_two_parts():
    where = rows((150, 80, 40), (290,), total=300)
    q, k, v = arrays(300, 300, 3, 1, 16, jnp.bfloat16)

    def two(q, k, v, near, far):
        masks = causal() & window(70), causal() & ~window(70)
        return [Part(q, k, mask, mod) for mask, mod in zip(masks, (near, far), strict=True)], v

    given = q, k, v, MODS["t5"](3), MODS["by distance"](3)
    found, expected = both(two, given, where, where)
    close(jax.tree.leaves(found), jax.tree.leaves(expected), 3e-2)


def test_a_table_by_loops():
    """Rows of their own, indices of one row or column, and sums of what stands for an entry."""
    random = np.random.default_rng(0)
    own, index = random.normal(size=(8, 256)).astype(np.float32), random.integers(0, 256, (8, 200))
    expected = [[row[n] for n in at] for row, at in zip(own, index, strict=True)]
    np.testing.assert_array_equal(lookup(jnp.asarray(own), jnp.asarray(index)), expected)
    one, d = own[:1, :128], random.normal(size=(8, 200)).astype(np.float32)
    for at in (index // 2, index[:1] // 2, index[:, :1] // 2):
        found, pull = jax.vjp(lambda table, at=at: lookup(table, jnp.asarray(at)), jnp.asarray(one))
        np.testing.assert_array_equal(found, one[0][at])
        total = np.zeros((1, 128))
        np.add.at(total[0], at, d[: at.shape[0], : at.shape[1]])
        (d_table,) = pull(jnp.asarray(d[: at.shape[0], : at.shape[1]]))
        np.testing.assert_allclose(d_table, total, atol=1e-5)


@pytest.mark.parametrize(
    "mod, message",
    [
        (ByDistance(table(2, 257)), r"ByDistance looks up 257 .*\(2, 257\).* at most 256.*blockw"),
        (Pairs(table(20, 20), table(40)), r"Pairs looks up 400 entries"),
    ],
)
def test_what_is_too_large_is_refused(mod, message):
    where = rows((20,), (20,), total=20)
    q, k, v = arrays(20, 20)
    with pytest.raises(ValueError, match=message):
        run(pallas, [Part(q, k, causal(), mod)], v, where, where)


@pytest.mark.parametrize(
    "cross, message",
    [
        (
            lambda table, at: table[at].sum(-1),
            r"\(2, 8\) by position otherwise than entry by entry",
        ),
        (lambda table, at: table.astype(int)[0, at], r"\(2, 8\) by position as int32, not a float"),
        (lambda table, at: jax.nn.one_hot(at, 8) @ table[0], r"\(2, 8\) by position in a way"),
    ],
)
def test_what_is_no_lookup_of_floats_is_refused(cross, message):
    mod = jax.tree_util.Partial(
        lambda table, score, q, k, head: score + cross(table, jnp.clip(q - k, 0, 1)), table(2, 8)
    )
    with pytest.raises(ValueError, match=message):
        Modification.of(mod).for_head((8, 1), (1, 128))
