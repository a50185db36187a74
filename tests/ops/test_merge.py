"""Partial attentions and their merge: one softmax over a union of keys, however it is split."""

import functools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    MASKS,
    ON_CPU,
    arrays,
    assert_gradients_equal,
    context,
    packed,
    small_blocks,
)
from jax.test_util import check_grads

from lcm.ops.attention import Part, Partial, attend, attend_partial, causal, merge, sinks, window

SPLIT = (causal() & window(5), causal() & ~window(5) & window(9), causal() & ~window(9))


@pytest.fixture(params=ON_CPU)
def backend(request, monkeypatch):
    small_blocks(monkeypatch)
    return request.param


@functools.partial(jax.jit, static_argnums=(0, 1))
def _three(backend, masks, q, k, v):
    where = packed(37)
    return [attend_partial([Part(q, k, mask)], v, where, where, backend=backend) for mask in masks]


def test_partials_are_those_of_the_oracle(backend):
    q, k, v = arrays(length=37, slots=37)
    where = packed(37)
    names = "causal", "beyond", "sinks"
    partials = _three(backend, tuple(MASKS[name][0] for name in names), q, k, v)
    for name, (out, lse) in zip(names, partials, strict=True):
        plain = [(np.asarray(q), np.asarray(k), MASKS[name][1])]
        expected = oracle.attend(plain, np.asarray(v), where[:2], where[:2])
        np.testing.assert_allclose(out, expected[0], atol=2e-5)
        np.testing.assert_allclose(lse, expected[1], atol=2e-5)
        assert lse.dtype == jnp.float32


def test_any_split_order_and_grouping_is_one_softmax(backend):
    q, k, v = arrays(length=37, slots=37)
    a, b, c = _three(backend, SPLIT, q, k, v)
    whole = _three(backend, (causal(),), q, k, v)[0]
    for merged in (merge(a, b, c), merge(c, a, b), merge(merge(a, b), c), merge(a, merge(b, c))):
        np.testing.assert_allclose(merged.out_BLHK, whole.out_BLHK, atol=1e-6)
        np.testing.assert_allclose(merged.lse_BLH, whole.lse_BLH, atol=2e-6)


def test_nothing_is_the_identity():
    q, k, v = arrays(length=37, slots=37)
    some = _three("reference", (causal(),), q, k, v)[0]
    nothing = Partial(jnp.zeros_like(some.out_BLHK), jnp.full_like(some.lse_BLH, -jnp.inf))
    for merged in (merge(some, nothing), merge(nothing, some), merge(some)):
        np.testing.assert_allclose(merged.out_BLHK, some.out_BLHK, atol=1e-7)
        np.testing.assert_allclose(merged.lse_BLH, some.lse_BLH, atol=1e-6)
    with pytest.raises(ValueError, match="at least one partial"):
        merge()


def test_a_bfloat16_partial_is_merged_in_float32():
    out = jnp.full((1, 1, 1, 4), 1.0, jnp.bfloat16)
    lse = jnp.zeros((1, 1, 1))
    assert merge(Partial(out, lse), Partial(out, lse)).out_BLHK.dtype == jnp.bfloat16
    wide = Partial(out.astype(jnp.float32) + 2**-12, lse)
    merged = merge(wide, Partial(out, lse)).out_BLHK
    assert merged.dtype == jnp.float32
    np.testing.assert_array_equal(merged, np.float32(1 + 2**-13))


def test_keys_in_two_parts_count_twice(backend):
    """As documented: the union is of scores, not of keys."""
    q, k, v = arrays(length=37, slots=37)
    twice = jax.jit(
        lambda: attend_partial([Part(q, k), Part(q, k, causal() & window(5))], v, backend=backend)
    )()
    where = context(np.ones((2, 37)))
    parts = [(np.asarray(q), np.asarray(k), MASKS[name][1]) for name in ("causal", "window")]
    expected = oracle.attend(parts, np.asarray(v), where[:2], where[:2])
    np.testing.assert_allclose(twice.out_BLHK, expected[0], atol=2e-5)
    np.testing.assert_allclose(twice.lse_BLH, expected[1], atol=2e-5)


def _plain_loss(q, k, v, seen):
    """Outputs and log-sums in three lines of jax.nn, weighted; rows that see nothing give 0."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    score = jnp.einsum("blhk,bshk->bhls", q, k) / q.shape[-1] ** 0.5
    some = seen.any(-1)
    score = jnp.where(seen & some[..., None] | ~some[..., None], score, -1e30)
    out = jnp.einsum("bhls,bshk->blhk", jax.nn.softmax(score) * some[..., None], v)
    lse = jnp.where(some, jax.nn.logsumexp(score, -1), 0.0)
    return _weighted(out) + _weighted(lse.transpose(0, 2, 1))


def _weighted(x):
    return (x * jnp.cos(jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape))).sum()


@pytest.mark.parametrize("masks", [(causal() & window(5),), (causal() & sinks(3),), SPLIT])
def test_gradients_of_outputs_and_log_sums(backend, masks):
    """`masks` of a part each, merged; documents that begin beyond the sinks see nothing there."""
    segments = np.repeat([[1, 2, 0]], [17, 17, 3], axis=1)
    where = context(np.concatenate([segments, segments]))
    where.positions_BL[:, 17:] += 50
    q, k, v = arrays(length=37, slots=37)

    def loss(q, k, v):
        partials = [
            attend_partial([Part(q, k, mask)], v, where, where, backend=backend) for mask in masks
        ]
        out, lse = merge(*partials)
        return _weighted(out) + _weighted(jnp.where(lse > -jnp.inf, lse, 0.0))

    distance = where.positions_BL[:, :, None] - where.positions_BL[:, None, :]
    seen = (distance >= 0) & (where.segments_BL[:, :, None] == where.segments_BL[:, None, :])
    seen &= where.segments_BL[:, None, :] > 0
    if len(masks) == 1:
        sinks_only = masks[0] == causal() & sinks(3)
        seen &= where.positions_BL[:, None, :] < 3 if sinks_only else distance < 5
    expected = jax.jit(jax.grad(_plain_loss, (0, 1, 2)))(q, k, v, jnp.asarray(seen)[:, None])
    found = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    assert_gradients_equal(found, expected, 2e-5)


def test_log_sums_against_finite_differences(backend):
    q, k, v = arrays(length=9, slots=9, size=8)

    def loss(q, k):
        lse = attend_partial([Part(q, k)], v, backend=backend).lse_BLH
        return (jnp.sin(lse) * jnp.arange(9.0)[:, None]).sum()

    check_grads(jax.jit(loss), (q, k), order=1, modes=["rev"], atol=0.03, rtol=0.03)


def test_rows_that_see_nothing_pass_no_gradient(backend):
    """Even where the loss itself has an infinite slope there."""
    q, k, v = arrays()
    where = context(np.ones((2, 21)), starts=50)

    def loss(q, k, v):
        part = Part(q, k, causal() & sinks(3))
        one = attend_partial([part], v, where, where, backend=backend)
        out, lse = merge(one, one)
        return out.sum() + jnp.exp(lse).sum() + jnp.where(lse > -9, lse, 0.0).sum()

    for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v):
        assert not np.asarray(gradient).any()


def test_attend_is_the_normalised_result(backend):
    q, k, v = arrays()
    out = jax.jit(lambda: attend([Part(q, k)], v, backend=backend))()
    partial = jax.jit(lambda: attend_partial([Part(q, k)], v, backend=backend))()
    np.testing.assert_array_equal(out, partial.out_BLHK)
