"""Mamba-3 as its paper defines it, token by token in float64, and what is known of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import HEADS, LENGTH, WIDTH, N, P, mixer, sigmoid, silu, softplus

from lcm import models
from lcm.errors import ConfigError
from lcm.nn import mamba3


def definition(layer, p, u):
    def rms(x, scale, eps):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale

    dt, lam = softplus(u @ p["dt"] + p["dt_bias"]), sigmoid(u @ p["trap"])
    a = u @ p["a"]
    A = -np.maximum(np.where(a >= 0, 1 + a, 1 / (1 - np.minimum(a, 0))), 1e-4)
    phi = np.cumsum(np.pi * np.tanh(u @ p["angle"])[:, None] * dt[..., None], 0)
    turned, rank = {}, layer.option("rank")
    for name in "bc":
        x = (u @ p[name]).reshape(len(u), rank, layer.groups, N)
        x = np.repeat(rms(x, p[f"{name}_norm"]["scale"], 1e-5), HEADS // layer.groups, 2)
        x = x + p[f"{name}_bias"]
        count = 2 * phi.shape[-1]
        pairs = (x[..., :count:2] + 1j * x[..., 1:count:2]) * np.exp(1j * phi)[:, None]
        x[..., :count:2], x[..., 1:count:2] = pairs.real, pairs.imag
        turned[name] = x
    ones = np.ones((rank, HEADS, P))
    k, q = turned["b"], turned["c"]
    x, z = ((u @ p[n]).reshape(len(u), 1, HEADS, P) * p.get(f"rank_{n}", ones) for n in "xz")
    write = np.einsum("lrhn,lrhp->lhnp", k, x)
    S, y = np.zeros((HEADS, N, P)), []
    for t in range(len(u)):
        alpha = np.exp(dt[t] * A[t])[:, None, None]
        before = ((1 - lam[t]) * dt[t])[:, None, None] * write[t - 1] if t else 0
        S = alpha * (S + before) + (lam[t] * dt[t])[:, None, None] * write[t]
        y.append(np.einsum("hnp,rhn->rhp", S, q[t]) + p["D"][:, None] * x[t])
    y = np.stack(y)
    y = rms(y, p["norm"]["scale"], layer.norm_eps) if "norm" in p else y
    out = (p.get("rank_out", ones) * y * silu(z)).sum(1)
    return out.reshape(len(u), -1) @ p["out"]


@pytest.mark.quick("", "rank=2*")
@pytest.mark.parametrize(
    "options", ["", "turned=1.0,normed=True", "turned=0.0", "rank=3", "rank=2,normed=True"]
)
def test_a_layer_is_what_its_paper_defines(tiny, options):
    keys = [f"model.options={options}"] if options else ["model.groups=2"]
    layer, params, run = mixer(tiny, "mamba3", *keys)
    u = np.random.default_rng(1).standard_normal((LENGTH, WIDTH))
    want = definition(layer, params, u)
    np.testing.assert_allclose(run(u), want, atol=2e-5 * np.abs(want).max())


def test_no_angle_and_no_trapezoid_is_the_recurrence_of_mamba2(tiny):
    """Of lam = 1 the state is written as there, with a decay that depends on the input."""
    layer, params, run = mixer(tiny, "mamba3")
    params["trap"][:], params["angle"][:] = 0, 0
    u = np.abs(np.random.default_rng(1).standard_normal((LENGTH, WIDTH)))
    params["trap"][:] = 30
    want = definition(layer, params, u)
    params["trap"][:] = 60
    np.testing.assert_allclose(definition(layer, params, u), want, atol=1e-9)
    np.testing.assert_allclose(run(u), want, atol=1e-4 * np.abs(want).max())


def test_turns_do_not_lose_their_angle():
    """After 2^18 tokens, where a float32 sum of angles knows them to 0.03 at best."""
    length = 1 << 18
    rate = jnp.full((1, length, 1), jnp.arctanh(jnp.float32(0.5)))
    ones, never = jnp.ones((1, length, 1)), jnp.zeros((1, length), bool)
    turns = mamba3._turns(jnp.zeros((1, 1, 1)), rate, ones, never)[0, :, 0, 0]
    np.testing.assert_allclose(np.abs(turns), 1, atol=1e-6)
    step = np.float64(jnp.pi * jnp.tanh(rate[0, 0, 0]))
    errors = np.abs(np.angle(np.asarray(turns) * np.exp(-1j * step * np.arange(1, length + 1))))
    assert errors.max() < 1e-4


def test_parity_is_a_half_turn_for_each_one():
    """The state is turned by pi on ones: its sign is the parity of them (section on tracking)."""
    bits = np.random.default_rng(0).integers(0, 2, 200)
    rate = jnp.float32(np.where(bits, 30.0, 0.0))[None, :, None]
    turns = mamba3._turns(
        jnp.zeros((1, 1, 1)), rate, jnp.ones((1, 200, 1)), jnp.zeros((1, 200), bool)
    )
    np.testing.assert_array_equal(np.asarray(turns.real[0, :, 0, 0]) < 0, np.cumsum(bits) % 2 == 1)


def test_a_share_that_is_no_pairs_is_refused(tiny):
    keys = "model.pattern=mamba3", "model.state=8", "model.options=turned=0.6"
    with pytest.raises(ConfigError, match=r"turned=0.6 of model.state=8 turns 4.8"):
        models.spec(tiny(*keys))


def test_every_parameter_learns(tiny):
    cfg = tiny("model.pattern=mamba3", "model.depth=1", "model.options=normed=True,rank=2")
    params, row = models.init(cfg, jax.random.key(0)), jnp.arange(24).reshape(2, 12)
    loss = lambda params: models.apply(cfg, params, row)[0].var()  # noqa: E731
    for path, gradient in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path
