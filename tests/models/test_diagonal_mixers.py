"""Mixers of vectors against float64 twins token by token, other libraries, and known properties."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from lcm import models, parallel, training
from lcm.errors import ConfigError
from lcm.nn import block
from lcm.nn.functional import functional
from lcm.nn.lti import held
from lcm.nn.mamba1 import selective_scan
from lcm.nn.min_rnn import positive

LENGTH, WIDTH = 24, 32
KEYS = {
    "mamba1": ["model.state=4", "model.recurrence_chunk=5", "model.options=normed=True"],
    "gated_conv": ["model.conv=3", "model.biases=all"],
    "min_gru": [],
    "min_lstm": [],
    "lstm": ["model.expand=1.5"],
    "lru": [],
    "s4d": ["model.state=8", "model.recurrence_chunk=7"],
    "s5": [],
    "slstm": [],
}


@pytest.fixture
def layer(tiny):
    """A function from a mixer and keys to its spec, apply and float32 parameters, all of them
    moved so that zeros and ones hide nothing."""

    def make(name, *keys):
        cfg = tiny(f"model.pattern={name}", "model.depth=1", *KEYS[name], *keys)
        spec = models.spec(cfg).layers[0]
        made = functional(lambda rngs: block.MIXERS[name](spec, rngs))
        params = made.init(jax.random.key(0))
        leaves, tree = jax.tree.flatten(params)
        random = np.random.default_rng(0)
        leaves = [x + 0.05 * random.standard_normal(x.shape, np.float32) for x in leaves]
        return spec, jax.jit(made.apply), jax.tree.unflatten(tree, leaves)

    return make


def inputs(rows=2, length=LENGTH, seed=0):
    x = np.random.default_rng(seed).standard_normal((rows, length, WIDTH), np.float32)
    return x, models.default_context((rows, length))


# Twins: float64, one token after another, as the formulas are published.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def convolved(x, taps, bias):
    """Causal, by channel, of `[L, C]`."""
    padded = np.concatenate([np.zeros((len(taps) - 1, x.shape[1])), x])
    rows = [(padded[t : t + len(taps)] * taps[:, 0]).sum(0) for t in range(len(x))]
    return np.stack(rows) + bias


def rms(x, norm):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * norm["scale"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def finished(y, p):
    return (gelu(y) @ p["out"]) * sigmoid(gelu(y) @ p["glu"])


def twin_mamba1(spec, p, u):
    x, z = silu(convolved(u @ p["x"], p["conv"], p["conv_bias"])), u @ p["z"]
    h, A, out = np.zeros((spec.inner, spec.state)), -np.exp(p["A_log"]), []
    for x_E, z_E in zip(x, z, strict=True):
        b, c = np.split(x_E @ p["bc"], 2)
        d = rms(x_E @ p["dt_down"], p["dt_norm"])
        b, c = rms(b, p["b_norm"]), rms(c, p["c_norm"])
        dt = np.log1p(np.exp(d @ p["dt_up"] + p["dt_bias"]))
        h = np.exp(dt[:, None] * A) * h + (dt * x_E)[:, None] * b
        out.append((h @ c + p["D"] * x_E) * silu(z_E))
    return np.stack(out) @ p["out"]


def twin_gated_conv(spec, p, u):
    b, c, x = (u @ p[name] + p[f"{name}_bias"] for name in ("b", "c", "x"))
    return (c * convolved(b * x, p["conv"], p["conv_bias"])) @ p["out"] + p["out_bias"]


def g(x):
    return np.where(x >= 0, x + 0.5, sigmoid(x))


def twin_min_gru(spec, p, x):
    h, out = np.zeros(spec.inner), []
    for x_D in x:
        z = sigmoid(x_D @ p["update"])
        h = (1 - z) * h + z * g(x_D @ p["candidate"])
        out.append(h)
    return np.stack(out) @ p["out"]


def twin_min_lstm(spec, p, x):
    h, out = np.zeros(spec.inner), []
    for x_D in x:
        f, i = sigmoid(x_D @ p["forget"]), sigmoid(x_D @ p["admit"])
        h = (f * h + i * g(x_D @ p["candidate"])) / (f + i)
        out.append(h)
    return np.stack(out) @ p["out"]


def twin_lstm(spec, p, x):
    c, h, out = np.zeros(spec.inner), np.zeros(spec.inner), []
    for x_D in x:
        i, f, new, o = np.split(x_D @ p["gates"] + h @ p["recurrent"] + p["gates_bias"], 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(new)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out) @ p["out"]


def system(p, a, s, x):
    """`Re(C h) + D x` of one system with complex states."""
    (B_re, B_im), (C_re, C_im) = np.split(p["B"], 2, 1), np.split(p["C"], 2, 0)
    h, out = np.zeros(len(a), complex), []
    for x_D in x:
        h = a * h + s * (x_D @ (B_re + 1j * B_im))
        out.append((h @ (C_re - 1j * C_im)).real + p["D"] * x_D)
    return finished(np.stack(out), p)


def twin_lru(spec, p, x):
    a = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    return system(p, a, np.exp(p["gamma_log"]), x)


def twin_s5(spec, p, x):
    rate = np.minimum(p["A_re"], -1e-4) + 1j * p["A_im"]
    a = np.exp(rate * np.exp(p["dt_log"]))
    return system(p, a, (a - 1) / rate, x)


def twin_s4d(spec, p, x):
    rate = -np.exp(p["A_log"]) + 1j * p["A_im"]
    a = np.exp(rate * np.exp(p["dt_log"])[:, None])
    h, out = np.zeros(a.shape, complex), []
    for x_D in x:
        h = a * h + (a - 1) / rate * x_D[:, None]
        C = p["C"][..., 0] + 1j * p["C"][..., 1]
        out.append(2 * (C * h).sum(-1).real + p["D"] * x_D)
    return finished(np.stack(out), p)


def twin_slstm(spec, p, u):
    """Without the running maximum."""
    shape = len(u), spec.heads, spec.head_size
    x = u @ p["x"]
    mixed = silu(convolved(x, p["conv"], p["conv_bias"])).reshape(shape)
    c, n, h, out = np.zeros(shape[1:]), np.zeros(shape[1:]), np.zeros(shape[1:]), []
    for mixed_HP, x_HP in zip(mixed, x.reshape(shape), strict=True):
        both = mixed_HP, mixed_HP, x_HP, x_HP
        i, f, z, o = (
            np.einsum("hp,hpq->hq", own, p["head_gates"][k])
            + np.einsum("hp,hpq->hq", h, p["head_recurrent"][k])
            + p["head_gates_bias"][k]
            for k, own in enumerate(both)
        )
        c = sigmoid(f) * c + np.exp(i) * np.tanh(z)
        n = sigmoid(f) * n + np.exp(i)
        h = sigmoid(o) * c / n
        centred = h - h.mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + spec.norm_eps)
        out.append((normed * p["head_norm"]["scale"]).reshape(-1))
    return np.stack(out) @ p["out"]


@pytest.mark.parametrize("name", KEYS)
def test_a_mixer_is_its_twin(layer, name):
    spec, apply, params = layer(name)
    x, context = inputs()
    got, none = apply(params, x, context, None, {})
    assert none is None
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    want = np.stack([globals()[f"twin_{name}"](spec, wide, row) for row in x.astype(np.float64)])
    assert np.std(want) > 0.05
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.quick("mamba1", "slstm")
@pytest.mark.parametrize("name", KEYS)
def test_gradients_are_those_of_one_chunk_and_reach_the_state(layer, name):
    x, context = inputs()

    def gradients(chunk):
        spec, apply, params = layer(name, f"model.recurrence_chunk={chunk}")
        state = block.MIXERS[name].init_state(spec, 2)

        def loss(params, x, memory):
            begun = dataclasses.replace(state, memory=memory, segment_B=state.segment_B + 1)
            out, after = apply(params, x, context, begun, {})
            return (out**2).sum() + sum((leaf**2).sum() for leaf in jax.tree.leaves(after.memory))

        memory = jax.tree.map(lambda leaf: leaf + 0.3, state.memory)
        return jax.jit(jax.grad(loss, (0, 1, 2)))(params, x, memory)

    got, want = gradients(5), gradients(LENGTH)

    def close(path, a, b):
        scale = np.abs(b).max()
        quiet = name == "slstm" and parallel.path(path) == "2/m"
        assert scale > 0 or quiet, path
        np.testing.assert_allclose(a, b, atol=1e-5 * max(scale, 1), err_msg=str(path))

    jax.tree_util.tree_map_with_path(close, got, want)


@pytest.mark.quick("s5")
@pytest.mark.parametrize("name", KEYS)
def test_every_parameter_has_a_rule_and_learns(tiny, name):
    cfg = tiny(f"model.pattern={name}", "model.depth=1", *KEYS[name], "train.optimizer=muon")
    training.abstract_state(cfg, parallel.make(cfg, jax.devices()[:1]))  # finds a rule for each
    spec, params = models.spec(cfg), models.init(cfg, jax.random.key(0))
    row, at = jnp.arange(24).reshape(2, 12), models.default_context((2, 12))
    padded = at._replace(segments_BL=at.segments_BL.at[:, 8:].set(0))

    def loss(params):
        logits, _ = models.decoder.apply(spec, params, row, padded, None)
        return jax.nn.log_softmax(logits)[:, :8, 3].sum()

    for path, leaf in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.all(np.isfinite(leaf)), parallel.path(path)
        assert jnp.abs(leaf).max() > 0, parallel.path(path)
    assert models.state_bytes_per_token(cfg) == 0
    assert models.flops_per_token(cfg, 16) == models.flops_per_token(cfg, 4096) > 0


def test_lstm_is_that_of_flax(layer):
    spec, apply, params = layer("lstm")
    x, context = inputs()
    names = [f"{kind}{gate}" for kind in "ih" for gate in "ifgo"]
    kernels = [*np.split(params["gates"], 4, 1), *np.split(params["recurrent"], 4, 1)]
    theirs = {name: {"kernel": kernel} for name, kernel in zip(names, kernels, strict=True)}
    for name, bias in zip(names[4:], np.split(params["gates_bias"], 4), strict=True):
        theirs[name]["bias"] = bias
    cell = linen.RNN(linen.OptimizedLSTMCell(spec.inner))
    want = cell.apply({"params": {"cell": theirs}}, x) @ params["out"]
    np.testing.assert_allclose(apply(params, x, context, None, {})[0], want, atol=1e-5)


def test_s4d_is_a_convolution_with_its_kernel(layer):
    _, apply, params = layer("s4d")
    x, context = inputs()
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    rate = -np.exp(p["A_log"]) + 1j * p["A_im"]
    dt, C = np.exp(p["dt_log"])[:, None], p["C"] @ [1, 1j]
    powers = np.exp(rate * dt)[..., None] ** np.arange(LENGTH)
    kernel = 2 * ((C * (np.exp(rate * dt) - 1) / rate)[..., None] * powers).sum(1).real
    spectrum = np.fft.rfft(kernel.T, 2 * LENGTH, axis=0) * np.fft.rfft(x, 2 * LENGTH, axis=1)
    y = np.fft.irfft(spectrum, axis=1)[:, :LENGTH] + p["D"] * x
    np.testing.assert_allclose(apply(params, x, context, None, {})[0], finished(y, p), atol=2e-5)


@pytest.mark.parametrize("name", ["s4d", "s5"])
def test_half_the_step_reads_everything_twice(layer, name):
    """States of x at a step of 1 are every second one of x twice at a step of 0.5."""
    x, _ = inputs()
    memories = []
    for step, row in ((1.0, x), (0.5, np.repeat(x, 2, 1))):
        spec, apply, params = layer(name, f"model.options=step={step}")
        state = block.MIXERS[name].init_state(spec, 2)
        at = models.default_context(row.shape[:2])
        memories.append(apply(params, row, at, state, {})[1].memory)
    for part in ("re", "im"):
        assert np.abs(memories[0][part]).max() > 0.01
        np.testing.assert_allclose(memories[1][part], memories[0][part], atol=1e-5)


def test_white_noise_has_variance_1_in_an_lru(tiny):
    cfg = tiny("model.pattern=lru", "model.depth=1", "model.options=r_max=0.95")
    spec = models.spec(cfg).layers[0]
    made = functional(lambda rngs: block.MIXERS["lru"](spec, rngs))
    params, (x, context) = made.init(jax.random.key(0)), inputs(64, 100)
    memory = made.apply(params, x, context, block.MIXERS["lru"].init_state(spec, 64), {})[1].memory
    assert np.mean(memory["re"] ** 2 + memory["im"] ** 2) == pytest.approx(1, abs=0.1)


def test_powers_of_e_next_to_1_keep_their_digits():
    z = np.array([-1e-6 + 2e-6j, -0.5 + 3j, -1e-3 - 0.1j], np.complex64)
    got, less = held(jnp.asarray(z))
    np.testing.assert_allclose(got, np.exp(z.astype(complex)), rtol=1e-6)
    np.testing.assert_allclose(less, np.expm1(z.astype(complex)), rtol=1e-6)


@pytest.mark.parametrize("lstm", [False, True], ids=["gru", "lstm"])
def test_minimal_gates_are_those_of_the_log_space_form(layer, lstm):
    """The paper's parallel form: a cumulated sum of logarithms, float64."""
    _, apply, params = layer("min_lstm" if lstm else "min_gru")
    x, context = inputs()
    softplus = lambda x: np.logaddexp(x, 0)  # noqa: E731
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    z = -x @ p["update"] if not lstm else None
    if lstm:
        z = -(softplus(-x @ p["forget"]) - softplus(-x @ p["admit"]))
    keep, write = -softplus(-z), -softplus(z)
    total = np.cumsum(keep, 1)
    new = np.log(g(x @ p["candidate"])) + write - total
    want = np.exp(total + np.logaddexp.accumulate(new, 1)) @ p["out"]
    np.testing.assert_allclose(apply(params, x, context, None, {})[0], want, atol=2e-5)
    np.testing.assert_allclose(positive(jnp.array([-1.0, 0, 2])), [sigmoid(-1.0), 0.5, 2.5])


def test_selective_scan_halves_and_stands_still():
    """N = 1, A = -1, b = c = 1: h halves with each step of log 2, and is still with none."""
    x = np.random.default_rng(0).standard_normal((1, 9, 3), np.float32)
    ones, no = np.ones((1, 9, 1), np.float32), np.zeros((1, 9), bool)
    h0 = np.full((1, 3, 1), 2, np.float32)
    for dt in (np.log(2), 0.0):
        y, last = selective_scan(
            *(jnp.asarray(x), jnp.full(x.shape, dt), -jnp.ones((3, 1)), ones, ones),
            *(jnp.asarray(h0), jnp.asarray(no), 4),
        )
        h, want = h0[:, :, 0], []
        for t in range(9):
            h = h * np.exp(-dt) + dt * x[:, t]
            want.append(h)
        np.testing.assert_allclose(y, np.stack(want, 1), atol=1e-6)
        np.testing.assert_allclose(last[..., 0], h, atol=1e-6)


@pytest.mark.parametrize("name", ["mamba1", "s4d"])
def test_nothing_has_the_size_of_all_states(tiny, name):
    """Neither kept for the backward pass, nor made: no array has states or masks of all tokens."""
    cfg = tiny(f"model.pattern={name}", "model.recurrence_chunk=8", "model.state=6")
    spec, params = models.spec(cfg), models.init(cfg, jax.random.key(0))
    row, at = jnp.zeros((1, 128), jnp.int32), models.default_context((1, 128))
    loss = lambda p: models.decoder.apply(spec, p, row, at, None)[0].sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    channels, numbers = (64, 6) if name == "mamba1" else (32, 3)
    sizes = {tuple(map(int, found.split(","))) for found in re.findall(r"\[([\d,]+)\]", text)}
    states = [size for size in sizes if size[-2:] == (channels, numbers)]
    assert (1, 8, channels, numbers) in states
    # Beside a chunk of 8 there are the states between 16 chunks, of at most two layers.
    assert max(math.prod(size[:-2]) for size in states) <= 2 * 16


@pytest.mark.slow
def test_initial_values_are_as_published(tiny):
    def mixer(name, *keys):
        cfg = tiny(f"model.pattern={name}", "model.depth=1", "model.width=128", *keys)
        made = models.init(cfg, jax.random.key(0))["layers"]["0"]["mixer"]
        return jax.tree.map(lambda leaf: np.asarray(leaf[0]), made)

    mamba = mixer("mamba1")
    np.testing.assert_allclose(np.exp(mamba["A_log"][5]), np.arange(1, 9), rtol=1e-5)
    dt = np.log1p(np.exp(mamba["dt_bias"]))
    assert 1e-3 <= dt.min() < 2e-3 and 0.07 < dt.max() <= 0.1
    assert mamba["dt_up"].shape == (8, 256) and 0.34 < np.abs(mamba["dt_up"]).max() <= 8**-0.5
    lru = mixer("lru", "model.options=r_min=0.9,r_max=0.999")
    size = np.exp(-np.exp(lru["nu_log"]))
    assert 0.9 <= size.min() < 0.91 and 0.99 < size.max() <= 0.999
    np.testing.assert_allclose(np.exp(lru["gamma_log"]) ** 2, 1 - size**2, rtol=1e-3)
    s4d = mixer("s4d")
    np.testing.assert_allclose(s4d["A_im"][3], np.pi * np.arange(4), rtol=1e-6)
    np.testing.assert_allclose(-np.exp(s4d["A_log"]), -0.5, rtol=1e-6)
    lstm = mixer("lstm", "model.expand=1", "model.options=chrono=100")
    i, f, *rest = np.split(lstm["gates_bias"], 4)
    assert f.min() >= 0 and 4.3 < f.max() <= np.log(99) and not np.any(rest)
    np.testing.assert_array_equal(i, -f)
    np.testing.assert_allclose(
        lstm["recurrent"][:, :128].T @ lstm["recurrent"][:, :128], np.eye(128), atol=1e-5
    )
    forget = mixer("slstm")["head_gates_bias"][1, 0]
    assert forget[0] == 5 and forget[-1] == -7


def test_s5_begins_with_hippo():
    """Its pairs diagonalise the normal part of HiPPO-LegS."""
    from lcm.nn.s5 import hippo

    size = 16
    at = np.arange(size)
    low = np.tril(np.sqrt(np.outer(1 + 2 * at, 1 + 2 * at)))
    legs, p = -(low - np.diag(at)), np.sqrt(at + 0.5)
    rate, vectors = hippo(size)
    assert vectors.shape == (16, 8) and np.all(rate.imag > 0)
    normal = legs + np.outer(p, p)
    np.testing.assert_allclose(normal @ vectors, vectors * rate, atol=1e-9)
    np.testing.assert_allclose(vectors.conj().T @ vectors, np.eye(8), atol=1e-9)


REFUSED = {
    "s4d model.state=7": "model.state=7 is odd, and S4D keeps pairs of numbers: take 8",
    "s5 model.expand=0.65625": "gives S5 21 numbers, which are no pairs",
    "mamba1 model.options=rank=-1": "rank=-1 must lie from 0 to 65536; rank=0",
    "lru model.options=r_max=1.5": "r_max=1.5 must lie from 0 to 1; r_max=1.0",
    "lru model.options=r_min=0.9,r_max=0.9": "r_min=0.9 and r_max=0.9, a ring without width",
    "s5 model.options=step=0": "step=0.0 must lie from 1e-06",
    "lstm model.options=normed=True": "'normed' is unknown, this mixer has chrono",
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused(tiny, key):
    name, key = key.split()
    with pytest.raises(ConfigError, match=REFUSED[f"{name} {key}"]):
        models.spec(tiny(f"model.pattern={name}", "model.heads=1", key))
