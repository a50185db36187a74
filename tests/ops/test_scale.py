"""No array of attention grows with the square of length: read off programs that are never run."""

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from lcm.ops.attention import (
    BlockMap,
    Mask,
    Part,
    Softmax,
    SoftmaxSink,
    Softplus,
    attend,
    causal,
    prefix,
    vertical_slash,
    window,
)
from lcm.types import Context

LONG = 65_536


def largest(function, *shapes):
    """Elements of the largest array in a program, those inside of loops included."""

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    return max(sizes(jax.make_jaxpr(function)(*shapes).jaxpr))


def heads(length, size=16):
    return jax.ShapeDtypeStruct((1, length, 1, size), jnp.float32)


def where(length):
    shape = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return Context(shape, shape, shape)


NORMALISERS = Softmax(), SoftmaxSink(jnp.zeros(1)), Softplus()


@pytest.mark.quick("w-Softmax", "p-Softplus")
@pytest.mark.parametrize("normaliser", NORMALISERS, ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("mask", [causal() & window(512), prefix(9), Mask()], ids=["w", "p", "all"])
def test_attention_of_64k_packed_tokens_and_its_gradient(mask, normaliser):
    def loss(q, k, v, where):
        part = Part(q, k, mask)
        out = attend([part], v, where, where, normaliser=normaliser, backend="blockwise")
        return out.sum()

    q = heads(LONG)
    assert largest(jax.grad(loss, (0, 1, 2)), q, q, q, where(LONG)) < LONG**2 / 1000


def test_attention_through_a_map_and_its_gradient():
    def loss(q, k, v, where, indices):
        part = Part(q, k, Mask(), blocks=BlockMap(64, indices, (0, LONG // 64 - 1)))
        return attend([part], v, where, where, backend="blockwise").sum()

    q, indices = heads(LONG), jax.ShapeDtypeStruct((1, LONG // 64, 8), jnp.int32)
    assert largest(jax.grad(loss, (0, 1, 2)), q, q, q, where(LONG), indices) < LONG**2 / 1000


def test_estimation_of_a_map():
    q = heads(LONG)
    found = jax.eval_shape(vertical_slash, q, q).indices_HQN
    assert found.shape == (1, LONG // 64, 32)
    assert largest(vertical_slash, q, q) < LONG**2 / 500  # 64 queries by all keys


def test_intervals_of_a_million_tokens():
    mask, million = causal() & window(1024), jax.ShapeDtypeStruct((1, 1_000_000), jnp.int32)
    lower, upper = jax.eval_shape(mask.interval, million)
    assert lower.shape == upper.shape == million.shape
    assert largest(mask.interval, million) == 1_000_000


def test_the_reference_is_seen_to_be_quadratic():
    """So that the other tests can fail."""
    q = heads(1024)
    run = lambda q, k, v: attend([Part(q, k)], v, backend="reference")  # noqa: E731
    assert largest(run, q, q, q) == 1024**2
