"""The kernels of the recurrence of a matrix, run as plain JAX, against one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_gradients import both, close, rounds_what_is_narrow

from lcm.ops.recurrence import op_matrix
from lcm.ops.recurrence.pallas import matrices
from lcm.ops.recurrence.reference import matrix_steps

pytestmark = pytest.mark.usefixtures("interpreted")


def case(length, groups, heads, states, width, dtype=jnp.float32, share=0.03):
    """q, k, v, log-decays, a state, and resets of a share of all tokens."""
    random = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(random.normal(size=s), jnp.float32)  # noqa: E731
    token = 2, length
    q, k = (draw(*token, groups, states).astype(dtype) / states**0.5 for _ in "qk")
    v, l = draw(*token, heads, width).astype(dtype), -0.3 * jnp.abs(draw(*token, heads))
    S0 = draw(2, heads, states, width)
    return (q, k, v, l, S0), jnp.asarray(random.random(token) < share)


def by_token(q, k, v, l, S0, reset):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return matrix_steps(q, k, v, l, None, S0, reset)


def in_kernels(q, k, v, l, S0, reset):
    return op_matrix(q, k, v, l, None, S0, reset)


@pytest.mark.parametrize(
    "shape",
    [
        (150, 1, 4, 24, 16),  # heads share q and k; two chunks, the second one short
        (20, 3, 3, 16, 40),  # none do
        (128, 2, 8, 8, 32),  # in groups, each of a block of 128 lanes
    ],
)
def test_is_token_by_token(shape, monkeypatch):
    monkeypatch.setattr(matrices, "WIDEST", 128)
    given, reset = case(*shape)
    close(both(in_kernels, given, reset), both(by_token, given, reset), 2e-5)


def test_blocks_of_heads_add_to_what_they_share(monkeypatch):
    """Four heads of 64 in two blocks, and the gradients of q and k of both."""
    monkeypatch.setattr(matrices, "WIDEST", 128)
    assert matrices.block(4, 64, 8) == 2
    given, reset = case(40, 1, 4, 8, 64)
    close(both(in_kernels, given, reset), both(by_token, given, reset), 2e-5)


def test_bfloat16_has_states_in_float32():
    rounds_what_is_narrow(in_kernels, by_token, *case(140, 1, 2, 32, 24, jnp.bfloat16))


def test_narrow_queries_and_wide_keys():
    """As interventions give them: what is bfloat16 loses nothing to what is not."""
    (q, k, v, l, S0), reset = case(20, 1, 2, 8, 16)
    given = q.astype(jnp.bfloat16), k, v, l, S0
    (y, S), (_, *gradients) = both(in_kernels, given, reset)
    (want_y, want_S), (_, *wanted) = both(by_token, given, reset)
    close((y, S, *gradients), (want_y, want_S, *wanted), 2e-5)


def test_long_decays_and_a_document_in_each_token():
    """Decays of a chunk that sum up to hundreds overflow nothing and keep their digits."""
    (q, k, v, l, S0), reset = case(130, 1, 2, 8, 16, share=1.0)
    l, run = 20 * l, jax.jit(in_kernels)
    assert l[:, :128].sum(1).min() < -500
    y, _ = run(q, k, v, l, S0, reset)
    np.testing.assert_allclose(y, (q * k).sum(-1, keepdims=True) * v, atol=1e-5)
    given = q, k, v, l, S0, reset & False
    close(run(*given), by_token(*given), 1e-4)


def test_what_has_a_kernel():
    """No chunk that is asked for, and more tokens than one."""
    (q, k, v, l, S0), reset = case(40, 1, 2, 8, 16)

    def calls(*given, **how):
        run = lambda *x: op_matrix(*x, **how)  # noqa: E731
        return str(jax.make_jaxpr(run)(*given)).count("pallas_call")

    assert calls(q, k, v, l, None, S0, reset) == 1
    assert calls(q, k, v, l, chunk=16) == 0
    assert calls(*(x[:, :1] for x in (q, k, v, l))) == 0
    assert calls(q, k, v.repeat(40, -1), l) == 0  # heads of 640
