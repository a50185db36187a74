"""Score modifications of the literature, written by a user: values and gradients in each backend.

Each is a registered dataclass of a few lines, beside a bias or factor built for the whole sequence
at once, as its paper writes it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import ON_CPU, arrays, assert_gradients_equal, packed, small_blocks

from lcm.ops.attention import BlockMap, Part, ScoreMod, attend, compose
from lcm.types import Array

LENGTH = 37


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buckets:
    """T5 (arXiv:1910.10683): a learned table by bucket of distance and head."""

    table_NH: Array
    largest: int = dataclasses.field(default=32, metadata={"static": True})

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        distance, exact = jnp.maximum(q_pos - k_pos, 0), self.table_NH.shape[0] // 2
        ratio = jnp.log(jnp.maximum(distance, 1) / exact) / np.log(self.largest / exact)
        far = jnp.minimum(exact + (ratio * exact).astype(jnp.int32), 2 * exact - 1)
        return score + self.table_NH[jnp.where(distance < exact, distance, far), head]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kerple:
    """KERPLE, logarithmic (arXiv:2205.09921): `score - r1 log(1 + r2 (i - j))`."""

    r1_H: Array
    r2_H: Array

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        distance = jnp.maximum(q_pos - k_pos, 0)
        return score - self.r1_H[head] * jnp.log1p(self.r2_H[head] * distance)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fire:
    """FIRE (arXiv:2310.04418): an MLP of `psi(i - j) / psi(max(i, L))`, `psi(x) = log(1 + c x)`."""

    c: Array
    limit: Array
    inner_F: Array
    offset_F: Array
    outer_FH: Array

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        psi = lambda x: jnp.log1p(jnp.abs(self.c) * x)  # noqa: E731
        at = psi(jnp.maximum(q_pos - k_pos, 0)) / psi(jnp.maximum(q_pos, jnp.abs(self.limit)))
        for inner, offset, outer_H in zip(self.inner_F, self.offset_F, self.outer_FH, strict=True):
            score = score + jax.nn.relu(at * inner + offset) * outer_H[head]
        return score


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Temperature:
    """A learned factor for each head."""

    factor_H: Array

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return score * self.factor_H[head]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogLength:
    """Scores grow with the log of the query's position (arXiv:2202.12172); `n` has no gradient."""

    n: Array

    def __call__(self, score: Array, q_pos: Array, k_pos: Array, head: Array) -> Array:
        return score * jnp.log(q_pos + 1.0) / jnp.log(self.n.astype(jnp.float32))


def t5(mod: Buckets, distance: Array, q_pos: Array) -> tuple[Any, Any]:
    """Factor and bias `[B, H, L, S]`; buckets by a loop over their first distances."""
    starts = [0, 1, 2, 3, *(int(np.ceil(4 * 8 ** (n / 4) - 1e-9)) for n in range(4))]
    bucket = sum((distance >= start).astype(int) for start in starts) - 1
    return 1.0, jnp.moveaxis(mod.table_NH[jnp.maximum(bucket, 0)], -1, 1)


def kerple(mod: Kerple, distance: Array, q_pos: Array) -> tuple[Any, Any]:
    r1, r2 = (r[:, None, None] for r in (mod.r1_H, mod.r2_H))
    return 1.0, -r1 * jnp.log(1 + r2 * jnp.maximum(distance, 0)[:, None])


def fire(mod: Fire, distance: Array, q_pos: Array) -> tuple[Any, Any]:
    top = jnp.maximum(q_pos[:, :, None], mod.limit)
    at = jnp.log(1 + mod.c * jnp.maximum(distance, 0)) / jnp.log(1 + mod.c * top)
    hidden = jnp.maximum(at[..., None] * mod.inner_F + mod.offset_F, 0)
    return 1.0, jnp.moveaxis(hidden @ mod.outer_FH, -1, 1)


def temperature(mod: Temperature, distance: Array, q_pos: Array) -> tuple[Any, Any]:
    return mod.factor_H[:, None, None], 0.0


def log_length(mod: LogLength, distance: Array, q_pos: Array) -> tuple[Any, Any]:
    return (jnp.log(1.0 + q_pos) / jnp.log(1.0 * mod.n))[:, None, :, None], 0.0


def some(seed: int, *shape: int) -> Array:
    return jax.random.uniform(jax.random.key(seed), shape, minval=0.2)


CASES: dict[str, tuple[ScoreMod, Any]] = {
    "t5": (Buckets(some(0, 8, 4)), t5),
    "kerple": (Kerple(some(0, 4), some(1, 4)), kerple),
    "fire": (
        Fire(jnp.array(0.3), jnp.array(9.0), some(0, 6), some(1, 6) - 0.9, some(2, 6, 4)),
        fire,
    ),
    "temperature": (Temperature(some(0, 4)), temperature),
    "log length": (LogLength(jnp.array(16)), log_length),
}


def weighted(x):
    return (x * jnp.cos(jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape))).sum()


def plain(q, k, v, mod, whole, where):
    """Dense attention in jax.nn under a factor and a bias for the whole sequence."""
    k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
    positions, segments = where.positions_BL, where.segments_BL
    distance = positions[:, :, None] - positions[:, None, :]
    seen = (distance >= 0) & (segments[:, :, None] == segments[:, None, :])
    seen = (seen & (segments[:, None, :] > 0))[:, None]
    factor, bias = whole(mod, jnp.asarray(distance), jnp.asarray(positions))
    score = jnp.einsum("blhk,bshk->bhls", q, k) / q.shape[-1] ** 0.5 * factor + bias
    p = jax.nn.softmax(jnp.where(seen, score, -1e30)) * seen.any(-1, keepdims=True)
    return weighted(jnp.einsum("bhls,bshk->blhk", p, v))


# "mapped" is blockwise through a block map that shows everything.
@pytest.mark.quick("t5-*", "log length-*")
@pytest.mark.parametrize("backend", [*ON_CPU, "mapped"])
@pytest.mark.parametrize("name", CASES)
def test_a_users_modification(backend, name, monkeypatch):
    small_blocks(monkeypatch)
    where, (mod, whole) = packed(LENGTH), CASES[name]
    blocks = None
    if backend == "mapped":
        backend, blocks = (
            "blockwise",
            BlockMap(16, np.tile(np.arange(3, dtype=np.int32), (1, 3, 1))),
        )

    def ours(q, k, v, mod):
        part = Part(q, k, score_mod=mod, blocks=blocks)
        return weighted(attend([part], v, where, where, backend=backend))

    def theirs(q, k, v, mod):
        return plain(q, k, v, mod, whole, where)

    given = (*arrays(length=LENGTH, slots=LENGTH), mod)
    (found, d_found), (expected, d_expected) = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2, 3), allow_int=True))(*given) for f in (ours, theirs)
    )
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-5)
    floating = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype == jnp.float32]  # noqa: E731
    assert_gradients_equal(floating(d_found), floating(d_expected), 1e-4)
    assert all(jnp.any(d != 0) for d in floating(d_expected))


def test_modifications_of_each_part_and_of_each_other():
    """Composed, and another in a second part: each of the parameters gets its own gradient."""
    q, k, v = arrays(length=LENGTH, slots=LENGTH)
    where = packed(LENGTH)
    first = compose(CASES["kerple"][0], CASES["temperature"][0])
    second = compose(CASES["log length"][0], CASES["t5"][0])

    def gradient(backend):
        def loss(first, second):
            parts = [Part(q, k, score_mod=first), Part(2 * q, k, score_mod=second)]
            return weighted(attend(parts, v, where, where, backend=backend))

        return jax.jit(jax.grad(loss, (0, 1), allow_int=True))(first, second)

    found, expected = (
        [x for x in jax.tree.leaves(gradient(backend)) if x.dtype == jnp.float32]
        for backend in ("blockwise", "reference")
    )
    assert len(found) == 4
    assert_gradients_equal(found, expected, 3e-5)
