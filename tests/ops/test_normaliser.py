"""Sinks and softplus: against the definitions, each other's limits, and dense JAX."""

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

from lcm.ops.attention import (
    BACKENDS,
    LinearBias,
    Part,
    SoftmaxSink,
    Softplus,
    attend,
    attend_partial,
    causal,
    merge,
    softplus,
    window,
)


@pytest.fixture(params=ON_CPU)
def backend(request, monkeypatch):
    small_blocks(monkeypatch)
    monkeypatch.setattr(softplus, "SCORES", 37 * 8)
    return request.param


def test_a_sink_is_a_key_of_value_zero(backend):
    """Against the oracle with one more key, whose score the bias sets and whose value is 0."""
    q, k, v = (np.asarray(x) for x in arrays())
    where, sink = context(np.ones((2, 21))), np.array([0.5, -1.0, 2.0, 0.0], np.float32)
    run = lambda sink: attend([Part(q, k)], v, normaliser=SoftmaxSink(sink), backend=backend)  # noqa: E731
    zero = np.zeros_like(k[:, :1])
    at = np.concatenate([where.positions_BL, np.full((2, 1), -5)], 1)
    expected, _ = oracle.attend(
        [(q, np.concatenate([k, zero], 1), lambda q, k: k <= q)],
        np.concatenate([v, zero], 1),
        where[:2],
        (at, np.ones_like(at)),
        lambda score, q_pos, k_pos, head: np.where(k_pos == -5, sink[head], score),
    )
    np.testing.assert_allclose(jax.jit(run)(sink), expected, atol=2e-5)
    assert (jax.jit(jax.grad(lambda s: run(s)[..., 0].sum()))(sink) != 0).all()


def test_gradients_of_a_sink(backend):
    q, k, v = arrays()

    def loss(q, k, v, sink):
        out = attend([Part(q, k)], v, normaliser=SoftmaxSink(sink), backend=backend)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

    def plain(q, k, v, sink):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        score = jnp.einsum("blhk,bshk->bhls", q, k) / 4.0
        score = jnp.where(jnp.tri(21, dtype=bool), score, -1e30)
        sinks = jnp.broadcast_to(sink[:, None, None], (*score.shape[:3], 1))
        p = jax.nn.softmax(jnp.concatenate([score, sinks], -1))[..., :-1]
        out = jnp.einsum("bhls,bshk->blhk", p, v)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

    given = q, k, v, jnp.array([0.5, -1.0, 2.0, 0.0])
    found, expected = (jax.jit(jax.grad(f, (0, 1, 2, 3)))(*given) for f in (loss, plain))
    assert_gradients_equal(found, expected)


def test_a_sink_belongs_to_one_of_the_partials():
    q, k, v = arrays()
    sink, near, far = SoftmaxSink(jnp.ones(4)), causal() & window(5), causal() & ~window(5)
    one = attend_partial([Part(q, k, near)], v, normaliser=sink)
    merged = merge(one, attend_partial([Part(q, k, far)], v)).out_BLHK
    np.testing.assert_allclose(merged, attend([Part(q, k)], v, normaliser=sink), atol=1e-6)
    with pytest.raises(ValueError, match=r"sink_H has shape \(3,\).* 4 heads"):
        attend([Part(q, k)], v, normaliser=SoftmaxSink(jnp.ones(3)))


def lssar(q, k, v, where, visible, power, modify=None):
    """The card's equations, a row at a time in float64; softplus and power taken by logarithms."""
    shared, size = q.shape[2] // k.shape[2], q.shape[3]
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, i, h in np.ndindex(q.shape[:3]):
        positions, segments = where.positions_BL[b], where.segments_BL[b]
        shown = np.array([visible(positions[i], p) for p in positions])
        at = np.flatnonzero(shown & (segments == segments[i]) & (segments > 0))
        if not len(at):
            continue
        keys, row = k[b, at, h // shared].astype(np.float64), q[b, i, h].astype(np.float64)
        cosine = keys @ row / np.linalg.norm(row) / np.linalg.norm(keys, axis=-1)
        score = np.log(size) * np.log(len(at)) * cosine
        if modify is not None:
            score = modify(score, positions[i], positions[at], h)
        weight = np.logaddexp(score, 0)
        weight /= weight.sum()
        if power is not None:
            excess = np.maximum(len(at) * weight - (len(at) >= 4), 0)
            with np.errstate(divide="ignore"):
                logs = power * np.log(excess)
            if excess.max() > 0:
                weight = np.exp(logs - logs.max())
                weight /= weight.sum()
        out[b, i, h] = weight @ v[b, at, h // shared].astype(np.float64)
    return out


@pytest.mark.parametrize("name, power", [("causal", 15), ("causal", None), ("window", 3)])
def test_softplus_is_the_papers(backend, name, power):
    q, k, v = arrays(length=37, slots=37)
    where, slopes = packed(37), np.array([0.5, 0.25, 0.1, 0.0], np.float32)
    part = Part(q, k, MASKS[name][0], LinearBias(jnp.asarray(slopes)))
    run = lambda: attend([part], v, where, where, normaliser=Softplus(power), backend=backend)  # noqa: E731
    modify = lambda score, q_pos, k_pos, head: score - slopes[head] * (q_pos - k_pos)  # noqa: E731
    plain = (np.asarray(x) for x in (q, k, v))
    expected = lssar(*plain, where, MASKS[name][1], power, modify)
    np.testing.assert_allclose(jax.jit(run)(), expected, atol=1e-4)


def test_softplus_over_two_parts_is_one_row(backend):
    """Near and far keys in two parts: counts and sums are of both."""
    q, k, v = arrays(length=37, slots=37)
    near, far = causal() & window(5), causal() & ~window(5)
    run = lambda *parts: jax.jit(  # noqa: E731
        lambda: attend(parts, v, normaliser=Softplus(), backend=backend)
    )()
    np.testing.assert_allclose(run(Part(q, k, near), Part(q, k, far)), run(Part(q, k)), atol=2e-5)


def test_gradients_of_softplus_block_by_block(monkeypatch):
    monkeypatch.setattr(softplus, "SCORES", 37 * 8)
    where, slopes = packed(37), jnp.array([0.5, 0.25, 0.1, 0.0])

    def gradients(backend):
        def loss(q, k, v, slopes):
            part = Part(q, k, causal(), LinearBias(slopes))
            out = attend([part], v, where, where, normaliser=Softplus(3), backend=backend)
            return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arrays(length=37, slots=37), slopes)

    assert_gradients_equal(gradients("blockwise"), gradients("reference"), 2e-5)


def test_gradient_of_softplus_against_differences_of_the_oracle():
    """Along random directions in float64, where differences are good to seven digits."""
    given, where = arrays(length=9, slots=9, size=8), context(np.ones((2, 9)))

    def loss(q, k, v):
        return (attend([Part(q, k)], v, normaliser=Softplus(3), backend="reference") ** 2).sum()

    def plain(*given):
        return (lssar(*given, where, lambda q, k: k <= q, 3) ** 2).sum()

    found, random = jax.jit(jax.grad(loss, (0, 1, 2)))(*given), np.random.default_rng(0)
    given = [np.asarray(x, np.float64) for x in given]
    for i, gradient in enumerate(found):
        step = random.normal(size=given[i].shape) * 1e-6
        ahead, behind = (
            plain(*given[:i], given[i] + sign * step, *given[i + 1 :]) for sign in (1, -1)
        )
        expected = (ahead - behind) / 2e-6
        np.testing.assert_allclose((gradient * step).sum() * 1e6, expected, rtol=1e-4)


def test_powers_between_the_mean_and_the_largest(backend):
    """Power 1 changes the first three rows by nothing; a large power takes the best key."""
    q, k, v = arrays(length=37, slots=37)
    run = lambda power: jax.jit(  # noqa: E731
        lambda: attend([Part(q, k)], v, normaliser=Softplus(power), backend=backend)
    )()
    np.testing.assert_allclose(run(1)[:, :3], run(None)[:, :3], atol=1e-6)
    score = jnp.einsum("blhk,bshk->blhs", q, jnp.repeat(k, 2, 2) / 1.0)
    score = score / jnp.linalg.norm(jnp.repeat(k, 2, 2), axis=-1).transpose(0, 2, 1)[:, None]
    best = jnp.where(jnp.tri(37, dtype=bool)[:, None], score, -jnp.inf).argmax(-1)
    chosen = jnp.take_along_axis(jnp.repeat(v, 2, 2), best[..., None], axis=1)
    apart = np.sort(np.where(np.tri(37, dtype=bool)[:, None], score, -np.inf), -1)
    clear = (apart[..., -1] - apart[..., -2] > 0.3)[:, 3:]
    found = run(2000)[:, 3:]
    assert clear.sum() > 50
    np.testing.assert_allclose(found[clear], chosen[:, 3:][clear], atol=1e-3)


def test_equal_keys_keep_equal_weights(backend):
    """No key is above the average: values and gradients are those without re-weighting."""
    q, _, v = arrays(length=37, slots=37)
    k = jnp.ones_like(v)

    def run(v, power):
        return attend([Part(q, k)], v, normaliser=Softplus(power), backend=backend)

    mean = jnp.cumsum(v, 1) / jnp.arange(1, 38)[:, None, None]
    np.testing.assert_allclose(
        jax.jit(run, static_argnums=1)(v, 15), jnp.repeat(mean, 2, 2), atol=1e-5
    )
    for gradient in jax.jit(
        jax.grad(
            lambda q, k, v: attend([Part(q, k)], v, normaliser=Softplus(), backend=backend).sum(),
            (0, 1, 2),
        )
    )(q, k, v):
        assert np.isfinite(gradient).all()


@pytest.mark.slow
def test_re_weighting_at_length_2048_concentrates():
    """Entropies as measured elsewhere, up to the spread of random rows: ln 2048 is 7.62."""
    q, k, _ = arrays(1, 2048, heads=1, kv_heads=1, size=64, batch=16)
    eye = jnp.eye(2048)[None, :, None]

    @functools.partial(jax.jit, static_argnums=2)
    def entropy(q, k, power):
        part = Part(q[None], k[None])
        p = attend([part], eye, normaliser=Softplus(power), backend="reference")
        return jax.scipy.special.entr(p).sum()

    for power, expected in ((None, 6.88), (1, 6.26), (3, 5.39), (15, 1.69)):
        found = [entropy(*row, power) for row in zip(q, k, strict=True)]
        assert abs(np.mean(found) - expected) < 3 * np.std(found), power


def test_what_softplus_does_not_do(monkeypatch):
    q, k, v = arrays()
    with pytest.raises(ValueError, match=r"no partials.*one call of attend"):
        attend_partial([Part(q, k)], v, normaliser=Softplus())
    with pytest.raises(ValueError, match=r"scale 0.5 does nothing to Softplus"):
        attend([Part(q, k)], v, scale=0.5, normaliser=Softplus())
    with pytest.raises(ValueError, match=r"power=0.5.*at least 1"):
        Softplus(0.5)
    monkeypatch.setitem(BACKENDS, "kernel", BACKENDS["reference"]._replace(softplus=None))
    with pytest.raises(ValueError, match="'kernel' does not compute softplus: use 'blockwise'"):
        attend([Part(q, k)], v, normaliser=Softplus(), backend="kernel")
