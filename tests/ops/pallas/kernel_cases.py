"""Calls that tests of the kernels share, beside the reference; tiles of 128."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from lcm.ops.attention import compose, pallas, reference
from lcm.types import Context


def arrays(length, slots, heads=2, kv_heads=1, size=16, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda n, h: jnp.asarray(rng.normal(size=(2, n, h, size)), dtype)  # noqa: E731
    return make(length, heads), make(slots, kv_heads), make(slots, kv_heads)


def rows(*lengths, total):
    """Packed rows, each a tuple of lengths of documents; the rest is padding."""
    positions, segments = np.zeros((2, len(lengths), total), np.int32)
    for row, documents in enumerate(lengths):
        starts = np.cumsum((0, *documents))
        for number, (start, stop) in enumerate(itertools.pairwise(starts), 1):
            positions[row, start:stop] = np.arange(stop - start)
            segments[row, start:stop] = number
    return Context(positions, segments, np.full_like(positions, -1))


def run(backend, parts, v, q_where, k_where):
    out = backend.attend(tuple(parts), v, q_where, k_where, 0.3)
    return out if isinstance(out, tuple) else (out, None)


def both(make_parts, arguments, q_where, k_where):
    """Outputs and gradients of the kernels and of the reference, for parts made of arguments."""

    def outputs(backend, *arguments):
        parts, v = make_parts(*arguments)
        return run(backend, parts, v, q_where, k_where)[0]

    def loss(backend, *arguments):
        out = outputs(backend, *arguments).astype(jnp.float32)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    every = tuple(range(1, len(arguments) + 1))
    grad = jax.jit(jax.value_and_grad(loss, every, has_aux=True), static_argnums=0)
    found, expected = (grad(backend, *arguments) for backend in (pallas, reference))
    return (found[0][1], *found[1]), (expected[0][1], *expected[1])


def close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()), rtol=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Added:
    """Scores plus an array of their own shape: its gradient is that of every single score."""

    bias_BHLS: jax.Array

    def __call__(self, score, q_pos, k_pos, head):
        return score + self.bias_BHLS


def sums_of_terms(make, arguments, where):
    """For each head, the sum of |d_score (i - j)|, of which the slope's gradient is what is left.

    The terms cancel to a thousandth and less, so rounding is to be held against this sum.
    """
    (batch, total), heads = where.positions_BL.shape, arguments[-1].size

    def loss(zeros):
        parts, v = make(*arguments)
        parts = [
            dataclasses.replace(part, score_mod=compose(part.score_mod, Added(zero)))
            for part, zero in zip(parts, zeros, strict=True)
        ]
        out = run(reference, parts, v, where, where)[0]
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

    zeros = [jnp.zeros((batch, heads, total, total)) for _ in make(*arguments)[0]]
    distance = where.positions_BL[:, :, None] - where.positions_BL[:, None]
    return sum(np.abs(d * distance[:, None]).sum((0, 2, 3)) for d in jax.jit(jax.grad(loss))(zeros))
