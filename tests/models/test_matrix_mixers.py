"""Mixers with a matrix for a state: their definitions token by token, and what is known of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import HEADS, LENGTH, WIDTH, N, P, mixer, sigmoid, silu, softplus

from lcm import models, parallel, training
from lcm.errors import ConfigError
from lcm.nn import deltanet, retention
from lcm.ops.recurrence import op_matrix

NAMES = ["linear_attention", "retnet", "gla", "deltanet", "gated_deltanet", "kda", "mlstm"]


def convolved(x, taps):
    padded = np.concatenate([np.zeros((len(taps) - 1, x.shape[1])), x])
    return silu(sum(taps[j, 0] * padded[j : j + len(x)] for j in range(len(taps))))


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def definition(name, layer, p, u):
    """The layer as its paper defines it, one token after the other, in float64."""
    q, k, v = (u @ p[x] for x in "qkv")
    if "conv_q" in p:
        q, k, v = (convolved(x, p[f"conv_{n}"]) for n, x in zip("qkv", (q, k, v), strict=True))
    q, k = (x.reshape(len(u), HEADS, N) for x in (q, k))
    v = v.reshape(len(u), HEADS, P)
    if "delta" in name or name == "kda":
        q, k = unit(q), unit(k)
    elif name == "linear_attention":
        q, k = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q, k))
    elif name == "retnet":
        angle = np.arange(len(u))[:, None, None] * 10000.0 ** (-np.arange(0, N, 2) / N)
        turn = np.exp(1j * angle)
        q, k = (_turned(x, turn) for x in (q, k))
    q = q if name == "linear_attention" else q / np.sqrt(N)
    y = np.stack([_head(name, layer, p, u, q[:, h], k[:, h], v[:, h], h) for h in range(HEADS)], 1)
    return _output(name, layer, p, u, y)


def _turned(x, turn):
    turned = (x[..., : N // 2] + 1j * x[..., N // 2 :]) * turn
    return np.concatenate([turned.real, turned.imag], -1)


def _head(name, layer, p, u, q, k, v, h):
    S, n, m, ys = np.zeros((N, P)), np.zeros(N), -np.inf, []
    for t in range(len(u)):
        if name == "mlstm":
            i, f = (15 * np.tanh((u[t] @ p[g] + p[f"{g}_bias"])[h] / 15) for g in "if")
            f = -softplus(-f)
            before, m = m, max(f + m, i)
            forget = np.exp(f + before - m) if np.isfinite(before) else 0.0
            S = forget * S + np.exp(i - m) * np.outer(k[t], v[t])
            n = forget * n + np.exp(i - m) * k[t]
            ys.append(S.T @ q[t] / (max(abs(n @ q[t]), np.exp(-m)) + 1e-6))
            continue
        decay, beta = _gates(name, layer, p, u[t], h)
        S = decay[:, None] * S
        write = v[t] if beta is None else beta * (v[t] - S.T @ k[t])
        S = S + np.outer(k[t], write)
        n = n + k[t]
        ys.append(S.T @ q[t] / (n @ q[t] + 1e-6 if dict(layer.options).get("normaliser") else 1))
    return np.stack(ys)


def _gates(name, layer, p, u, h):
    """The decay of each channel and, of a delta rule, beta."""
    own = slice(h * N, (h + 1) * N)
    beta = None
    if "beta" in p:
        beta = (1 + dict(layer.options)["negative"]) * sigmoid(u @ p["beta"])[h]
    if name == "retnet":
        return np.full(N, 1 - 2.0 ** (-5 - h)), beta
    if name == "gla":
        gate = (u @ p["decay_down"] @ p["decay_up"] + p["decay_bias"])[own]
        return sigmoid(gate) ** (1 / 16), beta
    if name == "gated_deltanet":
        step = softplus(u @ p["a"] + p["dt_bias"])[h]
        return np.full(N, np.exp(-np.exp(p["A_log"][h]) * step)), beta
    if name == "kda":
        step = softplus(u @ p["decay_down"] @ p["decay_up"] + p["dt_bias"])[own]
        return np.exp(-np.exp(p["A_log"][h]) * step), beta
    return np.ones(N), beta


def _output(name, layer, p, u, y):
    if name == "mlstm":
        y = y - y.mean(-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + layer.norm_eps) * p["norm"]["scale"]
    if name == "kda":
        gate = sigmoid(u @ p["gate_down"] @ p["gate_up"])
    else:
        gate = (sigmoid if name == "mlstm" else silu)(u @ p["z"])
    return (y.reshape(len(u), -1) * gate) @ p["out"]


OPTIONS = {
    "linear_attention": ["model.options=normaliser=True"],
    "deltanet": ["model.options=negative=True"],
    "kda": ["model.options=rank=5"],
    "mlstm": ["model.options=input_bias=-1.0"],
}


@pytest.mark.quick("deltanet", "mlstm", "kda", "retnet", "gla")
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_what_its_paper_defines(tiny, name):
    layer, params, run = mixer(tiny, name, *OPTIONS.get(name, []))
    u = np.random.default_rng(1).standard_normal((LENGTH, WIDTH))
    want = definition(name, layer, params, u)
    np.testing.assert_allclose(run(u), want, atol=2e-5 * np.abs(want).max())


def test_gated_deltanet_without_decay_is_deltanet(tiny):
    _, params, gated = mixer(tiny, "gated_deltanet")
    params["A_log"][:] = -30  # A = 0
    layer, own, _ = mixer(tiny, "deltanet")
    u = np.random.default_rng(1).standard_normal((LENGTH, WIDTH))
    shared = {name: params[name] for name in own}
    np.testing.assert_allclose(gated(u), definition("deltanet", layer, shared, u), atol=1e-4)


def test_kda_with_equal_channels_is_gated_deltanet():
    draw = np.random.default_rng(2)
    q, k, v = (jnp.float32(draw.standard_normal((1, 9, HEADS, n))) for n in (N, N, P))
    k, beta = deltanet.normalised(k), jax.nn.sigmoid(draw.standard_normal((1, 9, HEADS)))
    decay = -jnp.abs(jnp.float32(draw.standard_normal((1, 9, HEADS))))
    wide = jnp.repeat(decay[..., None], N, -1)
    erase = jnp.exp(decay)[..., None] * k, -beta[..., None] * k
    one, S1 = op_matrix(q, k, v * beta[..., None], decay, erase, chunk=4)
    two, S2 = op_matrix(q, k, v * beta[..., None], wide, erase, chunk=4)
    np.testing.assert_allclose(one, two, atol=1e-5)
    np.testing.assert_allclose(S1, S2, atol=1e-5)


def test_rules_of_decay():
    class Spec:
        heads = 5

        def __init__(self, rule):
            self.option = {"decay": rule}.get

    powers = np.exp(retention.log_decays(Spec("powers")))
    np.testing.assert_allclose(powers, [1 - 2.0**-n for n in range(5, 10)], rtol=1e-6)
    ranged = np.exp(retention.log_decays(Spec("range")))
    np.testing.assert_allclose(ranged, powers, rtol=1e-6)  # of five heads the rules are the same


@pytest.mark.slow
def test_initial_decays_are_as_published(tiny):
    keys = "model.width=128", "model.heads=64", "model.depth=1", "model.state=4"
    for name, least in (("gated_deltanet", 0.0099), ("kda", 1)):
        cfg = tiny(f"model.mixer={name}", f"model.pattern={name}", *keys)
        own = models.init(cfg, jax.random.key(0))["layers"]["0"]["mixer"]
        A, dt = np.exp(own["A_log"]), jax.nn.softplus(own["dt_bias"])
        assert least <= A.min() < 3 and 14 < A.max() <= 16
        assert 1e-3 <= dt.min() < 2e-3 and 0.07 < dt.max() <= 0.1001


@pytest.mark.quick("mlstm")
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns_and_has_a_rule(tiny, name):
    cfg = tiny(f"model.mixer={name}", f"model.pattern={name}", "model.depth=1")
    training.abstract_state(cfg, parallel.make(cfg, jax.devices()[:1]))
    params, row = models.init(cfg, jax.random.key(0)), jnp.arange(24).reshape(2, 12)
    loss = lambda params: models.apply(cfg, params, row)[0].var()  # noqa: E731
    for path, gradient in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (["model.mixer=retnet", "model.options=decay=fast"], "decay='fast'.*powers or range"),
        (["model.mixer=retnet", "model.state=7"], "model.state=7 is odd.*take 8"),
        (
            ["model.mixer=deltanet", "model.options=negative=3"],
            "negative is a bool.*negative=False",
        ),
        (["model.mixer=mlstm", "model.options=cap=1e400"], "cap is a float.*cap=15.0"),
        (["model.mixer=mamba2", "model.options=least_step=True"], "least_step is a float"),
        (["model.mixer=deltanet", "model.options=positive=True"], "'positive'.*has negative"),
        (["model.mixer=gla", "model.options=x=1"], "'x'.*has none"),
        (
            ["model.mixer=gated_deltanet", "model.kv_heads=3", "model.heads=4"],
            "kv_heads=3.*heads=4",
        ),
    ],
)
def test_what_cannot_be_is_refused(tiny, keys, match):
    name = keys[0].split("=")[1]
    with pytest.raises(ConfigError, match=match):
        cfg = tiny(f"model.pattern={name}", *keys)
        jax.eval_shape(lambda: models.init(cfg, jax.random.key(0)))
