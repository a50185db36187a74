"""The kernels of matrices with decays by channel, run as plain JAX, against one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_gradients import both, close, rounds_what_is_narrow

from lcm import models
from lcm.ops.recurrence import op_matrix, op_matrix_before
from lcm.ops.recurrence.pallas import channels, erasing
from lcm.ops.recurrence.pallas.halves import Pairs, products, spans_of
from lcm.ops.recurrence.reference import matrix_steps


@pytest.fixture(autouse=True)
def short_chunks(interpreted, monkeypatch):
    monkeypatch.setattr(channels, "CHUNK", 32)
    monkeypatch.setattr(channels, "ERASING", 16)


def case(length, groups, heads, states, width, dtype=jnp.float32):
    """q, k, v, log-decays, a, b and a state, and resets, of four rows that differ in decays.

    groups: of q, k, and if they are four of a and b, float32, else without these. Rows: small
    decays; some channels of some tokens that all but vanish; sums of hundreds in a chunk; none,
    and each third token begins a document. The others have few resets.
    """
    random = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(random.normal(size=s), jnp.float32)  # noqa: E731
    token = 4, length
    shared = [draw(*token, count, states) for count in groups]
    q, *others = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in shared)
    k, *erase = others
    q, k = q.astype(dtype), k.astype(dtype)
    v, l = draw(*token, heads, width).astype(dtype), -0.3 * jnp.abs(draw(*token, heads, states))
    l = l.at[1].add(-60.0 * (draw(length, heads, states) > 1)).at[2].multiply(80).at[3].set(0)
    reset = jnp.asarray(random.random(token) < 0.04).at[3].set(jnp.arange(length) % 3 == 0)
    erase = [erase[0], -erase[1]] if erase else []
    return (q, k, v, l, *erase, draw(4, heads, states, width)), reset


def by_token(q, k, v, l, *rest):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return matrix_steps(q, k, v, l, rest[:-2] or None, *rest[-2:])


def in_kernels(q, k, v, l, *rest):
    return op_matrix(q, k, v, l, rest[:-2] or None, *rest[-2:])


@pytest.mark.parametrize(
    "shape",
    [
        (70, (1, 1, 1, 1), 1, 24, 16),  # five chunks, the last one short
        (40, (2, 1), 2, 128, 128),  # two blocks, what is shared between them and what is not
    ],
)
def test_is_token_by_token(shape, monkeypatch):
    monkeypatch.setattr(erasing, "HEADS", 1)
    given, reset = case(*shape)
    got, want = (both(run, given, reset) for run in (in_kernels, by_token))
    for row in range(4):  # each by its own largest number
        close(*(jax.tree.map(lambda x: x[row], x) for x in (got, want)), 2e-5)  # noqa: B023


@pytest.mark.quick("groups1")
@pytest.mark.parametrize("groups", [(1, 1), (1, 1, 1, 1)])
def test_bfloat16_has_states_in_float32(groups):
    rounds_what_is_narrow(in_kernels, by_token, *case(40, groups, 1, 32, 24, jnp.bfloat16))


@pytest.mark.parametrize("strict", [False, True])
def test_products_of_halves_are_those_of_pairs(strict):
    """To the last digits, beside decays after which no float32 has any left."""
    random = np.random.default_rng(0)
    x, y, l = random.normal(size=(16, 8)), random.normal(size=(32, 8)), -random.random((16, 8))
    l[5, ::2] = -1e30

    def run(x, y, l):
        halves, whole = spans_of(l)
        return products(Pairs(x, y, strict, jnp.float32), halves), whole.through, whole.after

    got, through, after = jax.jit(run)(*(jnp.asarray(z, jnp.float32) for z in (x, y, l)))
    for i in range(16):
        for j in range(i + (not strict)):
            decay = np.exp2(l[j + 1 : i + (not strict)].sum(0))
            want = (x[i] * y.reshape(2, 16, 8)[:, j] * decay).sum(-1)
            np.testing.assert_allclose(got[i, [j, 16 + j]], want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(through[:5], l.cumsum(0)[:5], rtol=1e-6)
    want = [l[i:].sum(0) for i in range(6, 17)]
    np.testing.assert_allclose(after[5:], want, rtol=1e-6)


def test_what_has_a_kernel():
    """Heads that lie in lanes, no chunk that is asked for, and more tokens than one; with a rate of
    heads too, and where the state is read before it is written."""
    (q, k, v, l, a, b, S0), reset = case(40, (1, 1, 2, 2), 2, 8, 16)

    def calls(*given, run=op_matrix, **how):
        return str(jax.make_jaxpr(lambda *x: run(*x, **how))(*given)).count("pallas_call")

    assert calls(q, k, v, l, None, S0, reset) == 1
    assert calls(q, k, v, l, (a, b), S0, reset) == 1
    assert calls(q, k, v, l, (a, b, l[..., 0])) == 1
    assert calls(q, k, v, l, None, S0, reset, run=op_matrix_before) == 1
    assert calls(q, k, v, l, (a, b), chunk=16) == 0
    assert calls(*(x[:, :1] for x in (q, k, v, l))) == 0
    assert calls(q, k, v.repeat(40, -1), l) == 0  # heads of 640


@pytest.mark.quick("kda")
@pytest.mark.parametrize("name", ["gla", "kda", "rwkv6", "rwkv7"])
def test_layers_have_the_kernel(tiny, name):
    cfg = tiny(f"model.pattern={name}", "model.depth=1", "model.recurrence_chunk=0")
    params = jax.eval_shape(lambda: models.init(cfg, jax.random.key(0)))
    run = lambda params: models.apply(cfg, params, jnp.zeros((1, 40), int))  # noqa: E731
    assert str(jax.make_jaxpr(run)(params)).count("name=channels_forward") == 1
