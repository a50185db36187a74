"""What is done to a recurrence from outside: against layers written out token by token."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import models
from lcm.errors import ConfigError
from lcm.nn import MIXERS, interventions
from lcm.nn.functional import functional

MAMBA2 = ("model.pattern=mamba2", "model.groups=2", "model.norm_eps=1e-5")
RGLRU = ("model.pattern=rglru", "model.expand=1")
EACH = ["step=0.5", "step=0.5,exact=True", "retain=0.9,insert=0.7", "window=5"]
LENGTH, CUT, END = 21, 8, 19  # a document begins at CUT, and padding at END


def layer(tiny, *keys):
    """Functions of the first kind's mixer, its parameters, inputs and where they stand."""
    spec = models.spec(tiny("model.depth=1", "model.mlp=none", "model.width=16", *keys)).layers[0]
    mixer = functional(lambda rngs: MIXERS[spec.mixer](spec, rngs))
    params = jax.tree.map(filled, mixer.init(jax.random.key(0)))
    mixer = mixer._replace(apply=jax.jit(mixer.apply))
    noise = jax.random.normal(jax.random.key(1), (2, LENGTH, 16))
    context = models.default_context((2, LENGTH))
    segments = jnp.where(jnp.arange(LENGTH) < CUT, 1, 2) * (jnp.arange(LENGTH) < END)
    context = context._replace(segments_BL=jnp.broadcast_to(segments, (2, LENGTH)))
    return spec, mixer, params, noise, context


def filled(leaf):
    """Parameters that begin at 0, as outputs of RWKV's layers do, with something in them."""
    return jnp.where(
        leaf == 0, 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), leaf
    )


def documents():
    """Where each lies."""
    return slice(0, CUT), slice(CUT, END)


def softplus(x):
    return np.logaddexp(0, x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def conv(x, taps, bias):
    """Of one document, `[L, C]`."""
    width = len(taps)
    wide = np.concatenate([np.zeros((width - 1, x.shape[1])), x])
    return bias + sum(taps[j] * wide[j : j + len(x)] for j in range(width))


def changed(own, l):
    """The decay of a log-decay and what writes are multiplied by, as the module's table says."""
    gain = own.insert
    if own.step != 1:
        gain *= np.expm1(own.step * l) / np.expm1(l) if own.exact else own.step
    return own.retain * np.exp(own.step * l), gain


def state_at(decays, writes, window):
    """The states of a document: all that has been written, or in the last places of the row."""
    first = lambda t: 0 if not window else max(0, t - window + 1)  # noqa: E731
    return np.stack(
        [
            sum(np.prod(decays[i + 1 : t + 1], axis=0) * writes[i] for i in range(first(t), t + 1))
            for t in range(len(writes))
        ]
    )


def mamba2_twin(own, spec, p, u):
    """`[L, D]` of one document, float64."""
    heads, size = spec.heads, spec.head_size
    silu = lambda x: x * sigmoid(x)  # noqa: E731
    x = silu(conv(u @ p["x"], p["conv_x"][:, 0], p["conv_x_bias"])).reshape(-1, heads, size)
    bc = silu(conv(u @ p["bc"], p["conv_bc"][:, 0], p["conv_bc_bias"]))
    b, c = np.split(bc.reshape(len(u), 2 * spec.groups, -1), 2, axis=1)
    b, c = (np.repeat(each, heads // spec.groups, 1) for each in (b, c))
    dt = softplus(u @ p["dt"] + p["dt_bias"])
    decay, gain = changed(own, -np.exp(own.spectrum * p["A_log"]) * dt)
    writes = np.einsum("lhn,lhp->lhnp", b, x * (dt * gain)[..., None])
    S = state_at(decay[..., None, None], writes, own.window)
    y = np.einsum("lhnp,lhn->lhp", S, c) + p["D"][:, None] * x
    z = silu(u @ p["z"])
    y = (y.reshape(z.shape) * z).reshape(len(u), spec.groups, -1)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
    return (y.reshape(z.shape) * p["norm"]["scale"]) @ p["out"]


def rglru_twin(own, spec, p, u):
    x = conv(u @ p["x"], p["conv"][:, 0], p["conv_bias"])
    opened = {}
    for name in ("recurrence", "input"):
        by_head = x.reshape(len(u), spec.heads, -1)
        gate = np.einsum("lhi,hij->lhj", by_head, p[name]).reshape(x.shape)
        opened[name] = sigmoid(gate + p[f"{name}_bias"])
    l = -8 * opened["recurrence"] * softplus(p["a_param"])
    share = np.sqrt(-np.expm1(2 * l))
    share[0] = 1
    decay, gain = changed(own, l)
    h = state_at(decay, gain * share * opened["input"] * x, own.window)
    gelu = np.asarray(jax.nn.gelu(u @ p["y"], approximate=True))
    return (h * gelu) @ p["out"]


def rwkv4_twin(own, spec, p, u):
    dx = np.concatenate([np.zeros((1, u.shape[1])), u[:-1]]) - u
    r, k, v = ((u + dx * p[f"mix_{name}"]) @ p[name] for name in "rkv")
    decay, gain = changed(own, -np.exp(own.spectrum * p["A_log"]))
    writes = (gain * np.exp(k))[..., None] * np.stack([v, np.ones_like(v)], -1)
    decays = np.broadcast_to(decay[:, None], writes.shape)
    S = state_at(decays, writes, own.window)
    num, den = np.moveaxis(np.concatenate([np.zeros_like(S[:1]), S[:-1]]), -1, 0)
    weight = np.exp(p["bonus"] + k)  # of the token itself, whatever is done to others
    return (sigmoid(r) * (num + weight * v) / (den + weight)) @ p["out"]


def rwkv6_twin(own, spec, p, u):
    dx = np.concatenate([np.zeros((1, u.shape[1])), u[:-1]]) - u
    low = np.tanh((u + dx * p["mix_x"]) @ p["mix_down"]).reshape(len(u), 5, 32)
    x = {
        name: u + dx * (p[f"mix_{name}"] + low[:, i] @ p["mix_up"][i])
        for i, name in enumerate("wkvrg")
    }
    r, k, v = ((x[name] @ p[name]).reshape(len(u), spec.heads, -1) for name in "rkv")
    l = -np.exp(p["decay_bias"] + np.tanh(x["w"] @ p["decay_down"]) @ p["decay_up"])
    decay, gain = changed(own, l.reshape(k.shape))
    writes = np.einsum("lhn,lhp->lhnp", gain * k, v)
    S = state_at(decay[..., None], writes, own.window)
    S = np.concatenate([np.zeros_like(S[:1]), S[:-1]])  # read before it is written to
    y = np.einsum("lhnp,lhn->lhp", S, r) + (r * k * p["bonus"]).sum(-1, keepdims=True) * v
    y = y - y.mean(-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 64e-5)
    y = y * p["head_norm"]["scale"] + p["head_norm"]["bias"]
    g = x["g"] @ p["g"]
    return (y.reshape(len(u), -1) * g * sigmoid(g)) @ p["out"]


def lstm_twin(own, spec, p, u):
    c, h, outputs = np.zeros(spec.inner), np.zeros(spec.inner), []
    for x in u:
        i, f, g, o = np.split(x @ p["gates"] + p["gates_bias"] + h @ p["recurrent"], 4)
        decay, gain = changed(own, -softplus(-f))
        c = decay * c + gain * sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs) @ p["out"]


def close_to_twin(tiny, keys, extension, twin):
    spec, mixer, params, noise, context = layer(tiny, *keys, f"model.extension={extension}")
    got, _ = mixer.apply(params, noise, context, None, {})
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for row, places in itertools.product(range(2), documents()):
        want = twin(spec.extension, spec, wide, np.asarray(noise[row, places], np.float64))
        np.testing.assert_allclose(got[row, places], want, atol=3e-5)


@pytest.mark.quick("step=0.5,*", "retain*", "window*", "spectrum*")
@pytest.mark.parametrize("extension", [*EACH, "spectrum=0.8"])
def test_mamba_2_is_its_twin(tiny, extension):
    close_to_twin(tiny, MAMBA2, extension, mamba2_twin)


@pytest.mark.quick("step=0.5,*", "window*")
@pytest.mark.parametrize("extension", EACH)
def test_rg_lru_is_its_twin(tiny, extension):
    close_to_twin(tiny, RGLRU, extension, rglru_twin)


@pytest.mark.quick("step=0.5,*", "window*")
@pytest.mark.parametrize("extension", [*EACH, "spectrum=0.8"])
def test_rwkv_4_is_its_twin(tiny, extension):
    close_to_twin(tiny, ("model.pattern=rwkv4",), extension, rwkv4_twin)


@pytest.mark.quick("step=0.5,*", "window*")
@pytest.mark.parametrize("extension", EACH)
def test_rwkv_6_is_its_twin(tiny, extension):
    close_to_twin(tiny, ("model.pattern=rwkv6",), extension, rwkv6_twin)


@pytest.mark.quick("step=0.5,*", "retain*")
@pytest.mark.parametrize("extension", EACH[:3])
def test_lstm_is_its_twin(tiny, extension):
    close_to_twin(tiny, ("model.pattern=lstm",), extension, lstm_twin)


@pytest.mark.quick("mamba2", "rwkv7")
@pytest.mark.parametrize(
    "mixer",
    ["mamba2", "mlstm", "lru", "mamba1", "rwkv4", "rwkv6", "rwkv7", "lstm", "slstm", "mamba3"],
)
def test_what_says_nothing_changes_nothing(tiny, mixer):
    keys = (f"model.pattern={mixer}",)
    _, own, params, noise, context = layer(tiny, *keys)
    plain, _ = own.apply(params, noise, context, None, {})
    has = MIXERS[mixer].EXTENDS
    nothing = {"step": 1, "spectrum": 1, "retain": 1, "insert": 1, "window": LENGTH}
    text = ",".join(f"{name}={value}" for name, value in nothing.items() if name in has)
    _, own, *_ = layer(tiny, *keys, f"model.extension={text}")
    same, _ = own.apply(params, noise, context, None, {})
    np.testing.assert_array_equal(same, plain)
    changes = {"step": 0.5, "spectrum": 0.9, "retain": 0.9, "insert": 0.5, "window": 3}
    text = ",".join(f"{name}={value}" for name, value in changes.items() if name in has)
    _, own, *_ = layer(tiny, *keys, f"model.extension={text}")
    other, _ = own.apply(params, noise, context, None, {})
    assert np.isfinite(other).all() and abs(other - plain).max() > 1e-4


@pytest.mark.slow
def test_spectrum_is_of_the_rates_that_are_trained(tiny):
    for mixer in ("kda", "mamba1", "s4d"):
        keys = (f"model.pattern={mixer}",)
        _, own, params, noise, context = layer(tiny, *keys)
        want, _ = own.apply({**params, "A_log": 0.7 * params["A_log"]}, noise, context, None, {})
        _, own, *_ = layer(tiny, *keys, "model.extension=spectrum=0.7")
        got, _ = own.apply(params, noise, context, None, {})
        np.testing.assert_allclose(got, want, atol=1e-6, err_msg=mixer)


def read(own, params, noise, context, places, state):
    """Outputs and state of the tokens at some places, from a state."""
    at = slice(*places)
    part = jax.tree.map(lambda each: each[:, at], context)
    return own.apply(params, noise[:, at], part, state, {})


def emptied(state):
    """The state without what it remembers, with tails of convolutions and angles of Mamba-3."""
    memory = jax.tree.map(jnp.zeros_like, state.memory)
    if isinstance(memory, dict) and "angle" in memory:
        memory["angle"] = state.memory["angle"]
    return dataclasses.replace(state, memory=memory)


@pytest.mark.quick("mamba1")
@pytest.mark.parametrize("mixer", ["mamba1", "mamba3", "mamba3 rank 2", "s4d"])
def test_a_window_is_the_difference_of_two_states(tiny, mixer):
    """What tokens before the window have left in the state is nothing to those in it."""
    name, *rank = mixer.split(" ", 1)
    keys = (f"model.pattern={name}", *["model.options=rank=2" for _ in rank])
    spec, own, params, noise, context = layer(tiny, *keys, "model.extension=retain=0.9")
    window = 5
    _, cut, *_ = layer(tiny, *keys, f"model.extension=retain=0.9,window={window}")
    got, _ = cut.apply(params, noise, context, None, {})
    start = MIXERS[spec.mixer].init_state(spec, 2)
    for first, end in ((0, 3), (3, 8), (CUT, CUT + 2), (CUT + 3, CUT + 8), (END - 5, END)):
        state = start
        if first:
            _, state = read(own, params, noise, context, (0, first), start)
        y, _ = read(own, params, noise, context, (first, end), emptied(state))
        np.testing.assert_allclose(got[:, end - 1], y[:, -1], atol=2e-5, err_msg=f"{first} {end}")


@pytest.mark.parametrize("mixer", ["mamba1", "s4d"])
def test_what_is_retained_and_inserted_is_of_the_state(tiny, mixer):
    """`S' = a S + w` becomes `c a S + i w`: found from one token after two states."""
    keys = (f"model.pattern={mixer}",)
    spec, own, params, noise, context = layer(tiny, *keys)
    _, other, *_ = layer(tiny, *keys, "model.extension=retain=0.9,insert=0.7")
    start = MIXERS[spec.mixer].init_state(spec, 2)
    _, begun = read(own, params, noise, context, (0, 4), start)

    def memory(own, state):
        _, state = read(own, params, noise, context, (4, 5), state)
        return jax.tree.leaves(state.memory)

    after = memory(other, begun), memory(own, emptied(begun)), memory(own, begun)
    for got, new, whole in zip(*after, strict=True):
        np.testing.assert_allclose(got, 0.9 * (whole - new) + 0.7 * new, atol=1e-6)
        assert abs(np.asarray(whole - new)).max() > 1e-3


def test_what_the_mlstm_inserts_is_its_input_gate(tiny):
    keys = "model.pattern=mlstm", "model.options=cap=0"
    _, own, params, noise, context = layer(tiny, *keys)
    biased = {**params, "i_bias": params["i_bias"] + np.log(3.0)}
    want, _ = own.apply(biased, noise, context, None, {})
    _, own, *_ = layer(tiny, *keys, "model.extension=insert=3")
    np.testing.assert_allclose(own.apply(params, noise, context, None, {})[0], want, atol=1e-5)


def test_mamba_3_slows_down_as_by_a_pace_and_inserts_what_it_reads(tiny):
    keys = ("model.pattern=mamba3",)
    _, own, params, noise, context = layer(tiny, *keys)
    params["D"] *= 0
    paced = context._replace(pace_BL=jnp.full(noise.shape[:2], 0.5))
    slow, _ = own.apply(params, noise, paced, None, {})
    plain, _ = own.apply(params, noise, context, None, {})
    for extension, want in (("step=0.5", slow), ("insert=3", 3 * plain)):
        _, own, *_ = layer(tiny, *keys, f"model.extension={extension}")
        got, _ = own.apply(params, noise, context, None, {})
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=extension)


def test_exact_steps_in_number_are_one_step():
    """n steps of 1 / n of one input, and n tokens of it."""
    n, own = 4, interventions.Extension(step=0.25, exact=True)
    l = jnp.full((1, n, 2), -0.8)
    context = models.default_context((1, n))
    a, gain = interventions.scaled(own, l, context)
    h = 0.0
    for t in range(n):
        h = np.exp(a[0, t]) * h + gain[0, t] * 3.0
    np.testing.assert_allclose(h, 3.0, rtol=1e-6)  # what one step writes into nothing
    np.testing.assert_allclose(np.exp(a.sum(1)), np.exp(l[:, 0]), rtol=1e-6)


def test_a_gain_is_of_what_is_erased_too():
    """Of the rate that b has in each head, as of b; and nothing is erased at a pace of 0."""
    draw = np.random.default_rng(0).standard_normal
    q, k, v, l, rate = draw((1, 9, 1, 4)), draw((1, 9, 1, 4)), *draw((3, 1, 9, 2))
    q, k, v, l, rate = map(jnp.asarray, (q, k, v[..., None], -np.abs(l), rate))
    context = models.default_context((1, 9))._replace(pace_BL=jnp.arange(9.0)[None] / 8)
    own, S0, reset = interventions.Extension(insert=0.7), jnp.ones((1, 2, 4, 1)), jnp.zeros((1, 9))

    def run(*erase):
        given = q, k, v, l, erase, S0, reset.astype(bool), 4
        return interventions.matrix(own, context, *given)

    got, want = run(k, k, rate), run(k, rate[..., None] * k)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)
    np.testing.assert_allclose(got[0][:, 0], (q[:, 0] * S0[..., 0]).sum(-1)[..., None], atol=1e-5)


def test_a_pace_of_nothing_leaves_a_token_out(tiny):
    """For layers without convolutions it is as if it were padding, on which nothing depends."""
    for mixer in ("gla", "mlstm", "lru"):
        keys = (f"model.pattern={mixer}",)
        _, own, params, noise, context = layer(tiny, *keys)
        gone = context.positions_BL == 5
        paced = context._replace(pace_BL=jnp.where(gone, 0.0, 1.0))
        padded = context._replace(segments_BL=jnp.where(gone, 0, context.segments_BL))
        got, _ = own.apply(params, noise, paced, None, {})
        want, _ = own.apply(params, noise, padded, None, {})
        np.testing.assert_allclose(got[:, 6:], want[:, 6:], atol=1e-5, err_msg=mixer)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["model.extension=step=0.5"], "model.pattern=attention has none"),
        (["model.pattern=mamba2", "model.extension=pace=2"], "'pace' is unknown"),
        (["model.pattern=deltanet", "model.extension=window=9"], "window cannot be done"),
        (["model.pattern=lstm", "model.extension=window=2"], "window cannot be done"),
        (["model.pattern=rwkv7_channels", "model.extension=step=2"], "rwkv7_channels has none"),
        (
            [
                "model.pattern=rwkv7,channels",
                "model.kinds.channels.mixer=rwkv7_channels",
                "model.kinds.channels.extension=step=2",
            ],
            "which has no extension",
        ),
        (["model.pattern=gla", "model.extension=spectrum=2"], "spectrum cannot be done to gla"),
        (["model.pattern=mamba2", "model.extension=retain=1.5"], "from 1e-06 to 1"),
        (["model.pattern=mamba2", "model.extension=step=fast"], "step is a float.*step=1.0"),
        (["model.pattern=mamba2", "model.extension=window=2.7"], "window is a int.*window=0"),
        (["model.pattern=mamba2", "model.extension=window=1e400"], "window is a int.*window=0"),
        (["model.pattern=mamba2", "model.extension=step=0.5,step=2"], "gives step twice"),
        (["model.pattern=mamba2", "model.extension=exact=2"], "exact is a bool.*exact=False"),
    ],
)
def test_what_cannot_be_is_refused(tiny, keys, message):
    with pytest.raises(ConfigError, match=message):
        models.spec(tiny(*keys))


@pytest.mark.parametrize("other", ["attention", "gated_conv", "rwkv4_channels"])
def test_what_is_no_recurrence_is_left_alone(tiny, other):
    cfg = tiny(f"model.pattern={other},rwkv4", "model.extension=step=0.5")
    none, own = (layer.extension for layer in models.spec(cfg).layers)
    assert none == interventions.Extension() and own == interventions.Extension(step=0.5)


def test_a_window_keeps_the_tokens_it_still_sees(tiny):
    """Those of the window and what a convolution reads before it; the pace of each, too."""
    cfg = tiny("model.depth=1", "model.pattern=mamba2", "model.extension=window=4")
    params, row = models.init(cfg, jax.random.key(0)), jnp.arange(2 * LENGTH).reshape(2, LENGTH)
    pace = jnp.linspace(0.2, 1.8, LENGTH)
    at = models.default_context((2, LENGTH))
    at = at._replace(pace_BL=jnp.broadcast_to(pace, (2, LENGTH)))
    want, _ = models.apply(cfg, params, row, at)
    state = models.init_state(cfg, 2, LENGTH)
    (tail,) = state.layers[0].tails
    assert tail.shape == (1, 2, 4 + 3, cfg.model.width + 2)
    got = []
    for piece in (slice(0, 2), slice(2, 13), slice(13, LENGTH)):
        here = jax.tree.map(lambda x, piece=piece: x[:, piece], at)
        logits, state = models.apply(cfg, params, row[:, piece], here, state)
        got.append(logits)
    np.testing.assert_allclose(jnp.concatenate(got, 1), want, atol=2e-5)
    plain, _ = models.apply(cfg, params, row)
    assert abs(plain - want).max() > 1e-3
