"""RWKV-4, RWKV-6 and RWKV-7 as their papers define them, token by token in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from twins import HEADS, LENGTH, WIDTH, N, P, mixer, sigmoid, silu

from lcm import models
from lcm.nn import MIXERS
from lcm.nn.dense import orthogonal


def parts(p, u):
    """What channels and times are mixed of: the token, and its difference to the one before."""
    return u, np.concatenate([np.zeros((1, WIDTH)), u[:-1]]) - u


def by_head(x):
    return x.reshape(len(x), HEADS, -1)


def normed(p, y):
    y = y - y.mean(-1, keepdims=True)
    return y / np.sqrt((y**2).mean(-1, keepdims=True) + 64e-5) * p["scale"] + p["bias"]


def rwkv4(p, u, values):
    """Each mean by itself, of its tokens' weights as they are."""
    x, dx = parts(p, u)
    r, k, v = ((x + dx * p[f"mix_{name}"]) @ p[name] for name in "rkv")
    w, y = np.exp(p["A_log"]), []
    for t in range(len(u)):
        ages = np.arange(t - 1, -1, -1)[:, None]
        weights = np.exp(np.concatenate([k[:t] - ages * w, [k[t] + p["bonus"]]]))
        y.append((weights * v[: t + 1]).sum(0) / weights.sum(0))
    return (sigmoid(r) * np.stack(y)) @ p["out"]


def rwkv6(p, u, values):
    x, dx = parts(p, u)
    low = np.tanh((x + dx * p["mix_x"]) @ p["mix_down"]).reshape(len(u), 5, 32)
    mixed = {
        name: x + dx * (p[f"mix_{name}"] + low[:, i] @ p["mix_up"][i])
        for i, name in enumerate("wkvrg")
    }
    r, k, v = (by_head(mixed[name] @ p[name]) for name in "rkv")
    decay = p["decay_bias"] + np.tanh(mixed["w"] @ p["decay_down"]) @ p["decay_up"]
    w = by_head(np.exp(-np.exp(decay)))
    S, y = np.zeros((HEADS, N, P)), []
    for t in range(len(u)):
        new = k[t][:, :, None] * v[t][:, None]
        y.append(np.einsum("hn,hnp->hp", r[t], S + p["bonus"][:, :, None] * new))
        S = w[t][:, :, None] * S + new
    y = normed(p["head_norm"], np.stack(y)).reshape(len(u), -1)
    return (y * silu(mixed["g"] @ p["g"])) @ p["out"]


def rwkv7(p, u, values):
    x, dx = parts(p, u)
    mixed = {name: x + dx * p[f"mix_{name}"] for name in "rwkvag"}
    r, k, v = (mixed[name] @ p[name] for name in "rkv")
    w = np.exp(
        -0.6065306597
        * sigmoid(p["decay_bias"] + np.tanh(mixed["w"] @ p["decay_down"]) @ p["decay_up"])
    )
    a = sigmoid(p["rate_bias"] + mixed["a"] @ p["rate_down"] @ p["rate_up"])
    g = sigmoid(mixed["g"] @ p["gate_down"]) @ p["gate_up"]
    kappa = by_head(k * p["erase_scale"])
    kappa = kappa / np.linalg.norm(kappa, axis=-1, keepdims=True)
    if values is not None:
        share = sigmoid(p["value_bias"] + mixed["v"] @ p["value_down"] @ p["value_up"])
        v = v + (values - v) * share
    r, k, v, w, a = (by_head(y) for y in (r, k * (1 + (a - 1) * p["key_rate"]), v, w, a))
    S, y = np.zeros((HEADS, N, P)), []
    for t in range(len(u)):
        erased = np.einsum("hn,hnp->hp", kappa[t], S)
        S = w[t][:, :, None] * S - (a[t] * kappa[t])[:, :, None] * erased[:, None]
        S = S + k[t][:, :, None] * v[t][:, None]
        y.append(np.einsum("hn,hnp->hp", r[t], S))
    y = normed(p["head_norm"], np.stack(y))
    y = y + (r * k * p["bonus"]).sum(-1, keepdims=True) * v
    return (y.reshape(len(u), -1) * g) @ p["out"]


def opened_channels(p, u, values):
    x, dx = parts(p, u)
    k = np.maximum((x + dx * p["mix_k"]) @ p["k"], 0) ** 2
    return sigmoid((x + dx * p["mix_r"]) @ p["r"]) * (k @ p["out"])


def plain_channels(p, u, values):
    x, dx = parts(p, u)
    return np.maximum((x + dx * p["mix_k"]) @ p["k"], 0) ** 2 @ p["out"]


TWINS = {
    "rwkv4": rwkv4,
    "rwkv6": rwkv6,
    "rwkv7": rwkv7,
    "rwkv4_channels": opened_channels,
    "rwkv6_channels": opened_channels,
    "rwkv7_channels": plain_channels,
}


@pytest.mark.parametrize(("name", "handed"), [*((n, False) for n in TWINS), ("rwkv7", True)])
def test_a_layer_is_what_its_paper_defines(tiny, name, handed):
    _, params, run = mixer(tiny, name, "model.mlp=none")
    draw = np.random.default_rng(1)
    u, values = draw.standard_normal((LENGTH, WIDTH)), None
    if handed:
        values = draw.standard_normal((LENGTH, HEADS * P))
    shared = {"values": jnp.float32(values)[None]} if handed else {}
    want = TWINS[name](params, u, values)
    np.testing.assert_allclose(run(u, shared), want, atol=2e-5 * np.abs(want).max())


def test_a_first_layer_hands_its_values_on(tiny):
    """Of two layers the second sees the values of the first, whether stacked or one by one."""
    cfg = tiny("model.pattern=rwkv7", "model.mlp=none", "model.depth=2")
    params = models.init(cfg, jax.random.key(0))
    params["layers"] = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params["layers"]
    )
    row, spec = jnp.arange(10)[None], models.spec(cfg)
    want, _ = models.apply(cfg, params, row)

    x_BLD = params["embedding"]["table"][row]
    context = models.default_context(row.shape)
    run, values = models.decoder.block(spec.layers[0]).apply, None
    run = jax.jit(run, static_argnames="method")
    for n in range(2):
        own = jax.tree.map(lambda leaf, n=n: leaf[n], params["layers"]["0"])
        if n == 0:
            values = run(own, x_BLD, context, None, method="first_values")
        x_BLD, _ = run(own, x_BLD, context, None, {"values": values})
    got = models.decoder.logits(spec, params, models.decoder.final_norm(spec, params, x_BLD))
    np.testing.assert_allclose(got, want, atol=1e-5)
    without = [run(own, x_BLD, context, None, shared)[0] for shared in ({}, {"values": values})]
    assert np.abs(without[0] - without[1]).max() > 1e-3


def test_ranks_and_initial_values_are_those_of_the_releases(tiny):
    from lcm.nn.rwkv7 import rank_of

    class Spec:
        width, state = 768, 64
        option = {}.get

    assert [rank_of(Spec, name) for name in ("decay", "rate", "value", "gate")] == [64, 64, 32, 128]
    cfg = tiny("model.pattern=rwkv7", "model.mlp=none", "model.depth=1")
    own = models.init(cfg, jax.random.key(0))["layers"]["0"]["mixer"]
    assert not np.any(own["out"]) and not np.any(own["decay_down"])
    assert own["decay_bias"].min() > -8.1 and own["decay_bias"].max() < 3.1
    r = np.asarray(own["r"][0])
    np.testing.assert_allclose(r.T @ r, np.eye(r.shape[1]), atol=1e-5)
    assert MIXERS["rwkv7"].state_bytes(models.spec(cfg).layers[0], 4) == 0


@pytest.mark.slow
@pytest.mark.quick("rwkv7")
@pytest.mark.parametrize("name", ["rwkv4", "rwkv6", "rwkv7"])
def test_initial_values_differ_from_layer_to_layer(tiny, name):
    """By the formulas of the releases, of three layers; and of one that comes by two kinds."""
    keys = [f"model.pattern={name},{name}_channels", "model.mlp=none", "model.depth=6"]

    def made(keys, kind, count):
        many = jax.random.split(jax.random.key(0), count)
        return models.decoder._init_layers(models.spec(tiny(*keys)), kind, many)["mixer"]

    time, channels = made(keys, 0, 3), made(keys, 1, 3)
    i, n = np.arange(32) / 32, np.arange(3)[:, None]
    decays = time["A_log" if name == "rwkv4" else "decay_bias"]
    channel = np.arange(decays.shape[1]) / (decays.shape[1] - 1)
    if name == "rwkv4":
        np.testing.assert_allclose(time["mix_k"], 1 - i ** (1 - n / 3), atol=1e-5)
        values = 1 - i ** (1 - n / 3) - 0.3 * n / 2
        np.testing.assert_allclose(time["mix_v"], values, atol=1e-5)
        decay = -5 + 8 * channel ** (0.7 + 1.3 * n / 2)
        np.testing.assert_allclose(time["A_log"], decay, atol=1e-5)
        own = np.exp(time["bonus"])[:, :3] / np.exp([0, 0.5, -0.5])
        np.testing.assert_allclose(own, 0.3, atol=1e-5)
        np.testing.assert_allclose(channels["mix_r"], 1 - i ** (1 - n / 3), atol=1e-5)
    elif name == "rwkv6":
        np.testing.assert_allclose(time["mix_r"], 1 - i ** (0.5 * (1 - n / 3)), atol=1e-5)
        decay = -6 + 5 * channel ** (0.7 + 1.3 * n / 2)
        np.testing.assert_allclose(time["decay_bias"], decay, atol=1e-5)
        np.testing.assert_allclose(channels["mix_k"], 1 - i ** (1 - n / 3), atol=1e-5)
    else:
        np.testing.assert_allclose(time["mix_r"], 1 - i ** (0.2 * (1 - n / 3)), atol=1e-5)
        ramps = 6 * channel ** (1 + (n / 2) ** 0.3)
        rest = np.asarray(time["decay_bias"]) - ramps  # the same in all layers
        np.testing.assert_allclose(rest, np.broadcast_to(rest[0], rest.shape), atol=1e-5)
        np.testing.assert_allclose(channels["mix_k"], 1 - i ** ((1 - n / 3) ** 4), atol=1e-5)
    twice = [keys[0] + f",{name},{name}_channels", *keys[1:]]
    first, second = made(twice, 0, 2)["mix_r"], made(twice, 2, 1)["mix_r"]
    np.testing.assert_array_equal(first, time["mix_r"][::2])
    np.testing.assert_array_equal(second, time["mix_r"][1:2])


def test_matrices_of_layers_are_decomposed_one_after_another():
    """A batch of QRs may wait for ever on two cores."""

    def make(key):
        return orthogonal(nnx.Rngs(key), 8, 12)[...]

    keys = jax.random.split(jax.random.key(0), 3)
    program = str(jax.make_jaxpr(jax.vmap(make))(keys))
    assert re.search(r"f32\[12,8\] \w+:f32\[8,8\] = qr\[", program)
    made = jax.vmap(make)(keys)
    np.testing.assert_allclose(made @ made.swapaxes(1, 2), np.tile(np.eye(8), (3, 1, 1)), atol=1e-6)
    np.testing.assert_array_equal(made, [make(key) for key in keys])
