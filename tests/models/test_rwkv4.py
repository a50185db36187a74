"""RWKV-4 beyond its twin: keys of any size, gradients, and states from outside."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import models, parallel
from lcm.nn import MIXERS
from lcm.nn.functional import functional

LENGTH, WIDTH, CUT, END = 19, 16, 7, 17  # a document begins at CUT, and padding at END


def layer(tiny, *keys):
    """Its function, random parameters in float64, inputs and where they stand."""
    cfg = tiny("model.pattern=rwkv4", "model.depth=1", f"model.width={WIDTH}", *keys)
    spec = models.spec(cfg).layers[0]
    made = functional(lambda rngs: MIXERS["rwkv4"](spec, rngs))
    draw = np.random.default_rng(0)
    noisy = lambda x: np.asarray(x, np.float64) + 0.4 * draw.standard_normal(x.shape)  # noqa: E731
    params = jax.tree.map(noisy, made.init(jax.random.key(0)))
    u_BLD, context = draw.standard_normal((2, LENGTH, WIDTH)), models.default_context((2, LENGTH))
    segments_L = np.where(np.arange(LENGTH) < CUT, 1, 2) * (np.arange(LENGTH) < END)
    segments_BL = jnp.broadcast_to(segments_L, (2, LENGTH))
    return spec, jax.jit(made.apply), params, u_BLD, context._replace(segments_BL=segments_BL)


def twin(p, u_LD, window=LENGTH):
    """`[L, D]` of one document, with its logarithms of weights less their largest."""
    dx = np.concatenate([np.zeros((1, WIDTH)), u_LD[:-1]]) - u_LD
    r, k, v = ((u_LD + dx * p[f"mix_{name}"]) @ p[name] for name in "rkv")
    rows = []
    for t in range(len(u_LD)):
        first = max(t - window, 0)
        ages = np.arange(t - 1 - first, -1, -1)[:, None]
        logs = np.concatenate([k[first:t] - ages * np.exp(p["A_log"]), [k[t] + p["bonus"]]])
        weights = np.exp(logs - logs.max(0))
        rows.append((weights * v[first : t + 1]).sum(0) / weights.sum(0))
    return (np.stack(rows) / (1 + np.exp(-r))) @ p["out"]


def twins(p, u_BLD, window=LENGTH):
    """Those of all documents, and 0 at padding."""
    out = np.zeros(u_BLD.shape)
    for row in range(len(u_BLD)):
        for places in (slice(0, CUT), slice(CUT, END)):
            out[row, places] = twin(p, u_BLD[row, places], window)
    return out


@pytest.mark.parametrize("window", [LENGTH, 3])
@pytest.mark.parametrize("size", [1, 100])
def test_keys_may_be_of_any_size(tiny, size, window):
    """Weights of up to e^(+-700), and one of them that leaves a window takes no digit with it."""
    keys = f"model.extension=window={window}", "model.recurrence_chunk=4"
    _, apply, params, u_BLD, context = layer(tiny, *keys)
    params["k"] *= size
    # What a key of float32 cannot say is not the layer's: coarse ones, that both read alike.
    if size > 1:
        params["k"], u_BLD = np.round(params["k"]), np.round(u_BLD)
        params["mix_k"] = np.round(8 * params["mix_k"]) / 8
    got, _ = apply(jax.tree.map(jnp.float32, params), jnp.float32(u_BLD), context, None, {})
    want = twins(params, u_BLD, window)
    scale = np.abs(want).max()
    assert np.isfinite(got).all() and scale > 0.5
    np.testing.assert_allclose(got[:, :END], want[:, :END], atol=2e-5 * scale)


@pytest.mark.parametrize("window", [LENGTH, 3])
def test_gradients_are_those_of_the_twin(tiny, window):
    """Of each parameter and of the input, along a random direction, by differences in float64."""
    keys = f"model.extension=window={window}", "model.recurrence_chunk=4"
    _, apply, params, u_BLD, context = layer(tiny, *keys)
    draw = np.random.default_rng(1)
    weight_BLD = draw.standard_normal(u_BLD.shape)
    weight_BLD[:, END:] = 0

    def loss(params, u_BLD):
        return (apply(params, u_BLD, context, None, {})[0] * weight_BLD).sum()

    single = jax.tree.map(jnp.float32, (params, u_BLD))
    slopes = jax.jit(jax.grad(loss, (0, 1)))(*single)
    named = {**params, "input": u_BLD}
    found = {**slopes[0], "input": slopes[1]}
    for name, value in named.items():
        step = 1e-5 * draw.standard_normal(value.shape)

        def moved(sign, name=name, step=step):
            p = {**named, name: named[name] + sign * step}
            return (twins(p, p["input"], window) * weight_BLD).sum()

        want = (moved(1) - moved(-1)) / 2
        size = np.linalg.norm(found[name]) * np.linalg.norm(step)
        assert size > 1e-6, name
        error = abs((np.asarray(found[name], np.float64) * step).sum() - want)
        assert error < 1e-5 * size, (name, error / size)


def test_gradients_reach_the_state_and_are_those_of_one_chunk(tiny):
    """With one column of the state that has seen nothing, whose numbers are none."""

    def gradients(chunk):
        spec, apply, params, u_BLD, context = layer(tiny, f"model.recurrence_chunk={chunk}")
        begun = MIXERS["rwkv4"].init_state(spec, 2)
        begun = dataclasses.replace(begun, segment_B=begun.segment_B + 1)

        def loss(params, u_BLD, memory):
            before = dataclasses.replace(begun, memory=memory)
            out, after = apply(params, u_BLD, context, before, {})
            return (out**2).sum() + (after.memory["num"] / after.memory["den"]).sum()

        memory = {name: x + 0.3 for name, x in begun.memory.items()}
        memory["den"] = memory["den"].at[:, 0].set(-0.5)  # drawn, and no sum of weights
        single = jax.tree.map(jnp.float32, (params, u_BLD))
        return jax.jit(jax.grad(loss, (0, 1, 2)))(*single, memory)

    got, want = gradients(4), gradients(LENGTH)
    for name, slope in want[2].items():
        assert not np.any(slope[:, 0]) and np.abs(slope[:, 1:]).min(0).max() > 0, name

    def close(path, a, b):
        scale = np.abs(b).max()
        assert np.isfinite(scale) and scale > 0, path
        np.testing.assert_allclose(a, b, atol=1e-5 * max(scale, 1), err_msg=str(path))

    jax.tree_util.tree_map_with_path(close, got, want)


def test_every_parameter_has_a_rule_and_its_state_one_size(tiny):
    cfg = tiny("model.pattern=rwkv4,rwkv4_channels", "model.mlp=none", "model.depth=2")
    mesh = parallel.make(cfg, jax.devices()[:1])
    parallel.shardings(models.decoder.shapes(models.spec(cfg)), mesh)  # finds a rule for each
    assert models.state_bytes_per_token(cfg) == 0
    assert models.flops_per_token(cfg, 16) == models.flops_per_token(cfg, 4096) > 0
