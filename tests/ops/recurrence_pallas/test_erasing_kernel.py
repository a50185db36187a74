"""The kernels of matrices that erase, run as plain JAX, against one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_gradients import both, close, rounds_what_is_narrow

from lcm.ops.recurrence import op_matrix
from lcm.ops.recurrence.inverse import inverse
from lcm.ops.recurrence.pallas import erasing
from lcm.ops.recurrence.pallas.triangles import inverses
from lcm.ops.recurrence.reference import matrix_steps


@pytest.fixture(autouse=True)
def short_chunks(interpreted, monkeypatch):
    monkeypatch.setattr(erasing, "CHUNK", 32)


def case(length, groups, heads, states, width, dtype=jnp.float32, repeated=1):
    """q, k, v, log-decays, a, b and their rate, a state, and resets of a few tokens.

    groups: of q, k, a and b. As of the delta rule keys have length 1; each is given to so many
    tokens in turn, and then is k, a and b.
    """
    random = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(random.normal(size=s), jnp.float32)  # noqa: E731
    token = 2, length
    q, k, a, b = (draw(*token, count, states) for count in groups)
    k, a, b = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (k, a, b))
    rate = -jax.nn.sigmoid(draw(*token, heads))
    if repeated > 1:
        k = a = b = a[:, jnp.arange(length) // repeated * repeated]
        rate = -jnp.ones_like(rate)
    q, k, a, b = (x.astype(dtype) for x in (q / states**0.5, k, a, b))
    v, l = draw(*token, heads, width).astype(dtype), -0.3 * jnp.abs(draw(*token, heads))
    given = q, k, v, l, a, b, rate, draw(2, heads, states, width)
    return given, jnp.asarray(random.random(token) < 0.04)


def by_token(q, k, v, l, a, b, rate, S0, reset):
    q, k, a, b, v = (x.astype(jnp.float32) for x in (q, k, a, b, v))
    return matrix_steps(q, k, v, l, (a, b, rate), S0, reset)


def in_kernels(q, k, v, l, a, b, rate, S0, reset):
    return op_matrix(q, k, v, l, (a, b, rate), S0, reset)


@pytest.mark.parametrize(
    "shape",
    [
        (70, (1, 1, 1, 1), 1, 24, 16),  # three chunks, the last one short
        (40, (4, 2, 1, 4), 4, 128, 128),  # two blocks; what is shared within one and beyond
    ],
)
def test_is_token_by_token(shape, monkeypatch):
    monkeypatch.setattr(erasing, "HEADS", 2)
    given, reset = case(*shape)
    close(both(in_kernels, given, reset), both(by_token, given, reset), 2e-5)


def test_keys_that_repeat():
    """Each of nine tokens writes in the place of the one before: U is of differences."""
    (q, k, v, l, *rest), reset = case(64, (1, 1, 1, 1), 1, 16, 16, repeated=9)
    given = q, k, v, 0 * l, *rest
    close(both(in_kernels, given, reset & False), both(by_token, given, reset & False), 2e-5)


def test_bfloat16_has_states_in_float32():
    rounds_what_is_narrow(in_kernels, by_token, *case(70, (1, 1, 1, 1), 1, 32, 24, jnp.bfloat16))


def test_wide_a_and_b():
    """Float32 and without a rate, beside what is bfloat16: states are as exact."""
    (q, k, v, l, a, b, rate, S0), reset = case(40, (1, 1, 1, 1), 1, 8, 16)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    given = q, k, v, l, a, rate[..., None] * b, S0
    (y, S), gradients = both(lambda *x: op_matrix(*x[:4], x[4:6], *x[6:]), given, reset)
    assert [x.dtype for x in gradients] == [x.dtype for x in given]
    (want_y, want_S), wanted = both(
        lambda *x: by_token(*x[:6], jnp.ones_like(rate), *x[6:]), given, reset
    )
    close(S, want_S, 1e-5)
    close((y, *gradients), (want_y, *wanted), 1e-2)


def test_long_decays_and_a_document_in_each_token():
    """Decays of a chunk that sum up to hundreds overflow nothing and keep their digits."""
    (q, k, v, l, *rest), reset = case(40, (1, 1, 1, 1), 1, 8, 16)
    l, run = 80 * l, jax.jit(in_kernels)
    assert l[:, :32].sum(1).min() < -500
    y, _ = run(q, k, v, l, *rest, reset | True)
    np.testing.assert_allclose(y, (q * k).sum(-1, keepdims=True) * v, atol=1e-5)
    close(run(q, k, v, l, *rest, reset), by_token(q, k, v, l, *rest, reset), 1e-4)


def test_inverses():
    """Of what is small, and where all keys are alike, when squares have no digits left."""
    random, size = np.random.default_rng(0), 64
    strict = np.tril(random.normal(size=(size, size)) / 8, -1)
    alike = np.tril(-np.ones((size, size)), -1)
    given = [jnp.asarray(x, jnp.float32) for x in (strict, alike)]
    for A, got in zip((strict, alike), jax.jit(inverses)(given), strict=True):
        want = np.linalg.inv(np.eye(size) - A)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
        np.testing.assert_allclose(got, inverse(jnp.asarray(A, jnp.float32)), atol=1e-5)


def test_what_has_a_kernel():
    """Heads that lie in lanes, no chunk that is asked for, and more tokens than one."""
    (q, k, v, l, a, b, rate, S0), reset = case(40, (1, 1, 2, 2), 2, 8, 16)

    def calls(*given, **how):
        run = lambda *x: op_matrix(*x, **how)  # noqa: E731
        return str(jax.make_jaxpr(run)(*given)).count("pallas_call")

    assert calls(q, k, v, l, (a, b), S0, reset) == 1
    assert calls(q, k, v, l, (a, b, rate)) == 1
    assert calls(q, k, v, l, (a, b), chunk=16) == 0
    assert calls(*(x[:, :1] for x in (q, k, v, l)), (a[:, :1], b[:, :1])) == 0
    assert calls(q, k, v.repeat(40, -1), l, (a, b)) == 0  # heads of 640
    assert calls(q, k, v.repeat(3, 2), l.repeat(3, 2), (a, b)) == 0  # no part of six is in lanes
