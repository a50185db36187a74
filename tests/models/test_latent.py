"""Latent attention as its paper defines it, what a cache holds of it, and what is refused."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import HEADS, LENGTH, WIDTH, mixer

from lcm import aot, config, models, parallel
from lcm.decoding import Sampling
from lcm.decoding.engine import Engine
from lcm.decoding.requests import Request
from lcm.decoding.weights import laid_out
from lcm.errors import ConfigError, UserError
from lcm.evaluation import attention
from lcm.nn import MIXERS, latent
from lcm.nn.dense import Int8

K, R, S, P, Q = 8, 12, 4, 6, 5  # sizes: of a head, the latent, what is shared, values, queries
OPTIONS = f"model.options=rank={R},shared={S},values={P},eps=0.1"
KEYS = "model.pattern=latent_attention", OPTIONS


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * scale


def rotated(x):
    """Pairs (i, i + S/2) of `[L, ..., S]` turned by their positions."""
    angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, S, 2) / S)
    turn = np.exp(1j * angle).reshape(len(x), *[1] * (x.ndim - 2), -1)
    turned = (x[..., : S // 2] + 1j * x[..., S // 2 :]) * turn
    return np.concatenate([turned.real, turned.imag], -1)


def weights(p, x, turn):
    """Of a row `[L, D]`, in float64, by head, and its latents: equations 9 to 18 of
    arXiv:2405.04434, and its norms of section 3.1.2."""
    low = rms(x @ p["q_down"], p["q_norm"]["scale"]) @ p["q_up"] if "q_up" in p else x @ p["q"]
    q = low.reshape(len(x), HEADS, K + S)
    c = rms(x @ p["latent"], p["latent_norm"]["scale"])
    shared, q_shared = turn(x @ p["shared"]), turn(q[..., K:])
    found = []
    for h in range(HEADS):
        k = c @ p["k_up"][:, h * K : (h + 1) * K]
        score = (q[:, h, :K] @ k.T + q_shared[:, h] @ shared.T) / np.sqrt(K + S)
        share = np.exp(np.where(np.tril(np.ones(score.shape)), score, -np.inf))
        found.append(share / share.sum(-1, keepdims=True))
    return np.stack(found), c


def definition(p, x, turn):
    shares, c = weights(p, x, turn)
    v = c @ p["v_up"]
    out = [share @ v[:, h * P : (h + 1) * P] for h, share in enumerate(shares)]
    return np.concatenate(out, 1) @ p["out"]


@pytest.mark.parametrize(
    ("keys", "turn"),
    [
        (["model.positions=nope"], lambda x: x),
        ([f"{OPTIONS},query_rank={Q}"], rotated),
    ],
    ids=["nope", "rope and query rank"],
)
def test_a_layer_is_what_its_paper_defines(tiny, keys, turn):
    _, params, run = mixer(tiny, "latent_attention", OPTIONS, f"model.head_size={K}", *keys)
    x = np.random.default_rng(1).standard_normal((LENGTH, WIDTH))
    want = definition(params, x, turn)
    np.testing.assert_allclose(run(x), want, atol=2e-5 * np.abs(want).max())
    assert ("q_up" in params) == ("query_rank" in keys[0])


def test_sizes_that_are_not_said_are_those_of_the_paper(tiny):
    spec = models.spec(tiny(KEYS[0], f"model.head_size={K}")).layers[0]
    shapes = jax.eval_shape(lambda: models.decoder.block(spec).init(jax.random.key(0)))["mixer"]
    assert shapes["latent"].shape[1] == 4 * K and shapes["shared"].shape[1] == K // 2
    assert shapes["v_up"].shape == shapes["k_up"].shape == (4 * K, spec.heads * K)


@pytest.mark.parametrize("more", ["", f",query_rank={Q}"])
def test_flops_are_those_of_its_matrices_and_of_scores(tiny, more):
    """A product of a token with each matrix, and with keys and values of half of the tokens."""
    spec = models.spec(tiny(KEYS[0], OPTIONS + more, f"model.head_size={K}")).layers[0]
    shapes = jax.eval_shape(lambda: models.decoder.block(spec).init(jax.random.key(0)))["mixer"]
    numbers = sum(x.size for x in jax.tree.leaves(shapes) if x.ndim == 2)
    seen = spec.heads * (K + S + P) * (LENGTH + 1) / 2
    assert MIXERS["latent_attention"].flops(spec, LENGTH) == 2 * (numbers + seen)


def noisy(cfg):
    noise = lambda x: x + 0.03 * jax.random.normal(jax.random.key(2), x.shape)  # noqa: E731
    return jax.tree.map(noise, models.init(cfg, jax.random.key(0)))


TOKENS = np.arange(40, dtype=np.int32).reshape(2, 20) * 7 % 250


@pytest.fixture(scope="module")
def model():
    cfg = config.override(config.shrink(config.base()), [*KEYS, "model.depth=1"])
    return types.SimpleNamespace(cfg=cfg, params=noisy(cfg), tokenizer=None)


def test_a_cache_holds_the_latent_and_what_is_shared(model):
    state = models.init_state(model.cfg, 2, 20)
    held = jax.tree.map(jnp.shape, state.layers[0])
    assert held.k_BGSK[1:] == (2, 1, 20, S) and held.v_BGSK[1:] == (2, 1, 20, R)
    assert models.state_bytes_per_token(model.cfg) == 4 * (S + R) + 8


def test_positions_of_a_chain_scale_all_of_a_query(tiny):
    """A temperature is a factor on scores, so that it equals a scale of the layer's own."""
    positions = "model.positions=uniform_scale+rope", "model.positions.first.factor=1.7"
    warm = tiny(*KEYS, "model.depth=1", *positions)
    size = warm.model.width // warm.model.heads + S
    plain = tiny(*KEYS, "model.depth=1", f"model.score_scale={1.7 * size**-0.5}")
    params = noisy(plain)
    got, want = (models.apply(cfg, params, TOKENS)[0] for cfg in (warm, plain))
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert np.abs(want - models.apply(tiny(*KEYS, "model.depth=1"), params, TOKENS)[0]).max() > 0.01


def test_whoever_looks_at_scores_sees_those_of_the_whole_key(tiny):
    cfg = tiny(*KEYS, "model.depth=1", f"model.head_size={K}")
    params = noisy(cfg)
    got = models.probe(cfg, params, TOKENS[:1], attention.weights)
    own = jax.tree.map(lambda x: np.float64(x[0]), params["layers"]["0"])
    x = np.float64(params["embedding"]["table"])[TOKENS[0]]
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + cfg.model.norm_eps)
    want, _ = weights(own["mixer"], x * own["mixer_norm"]["scale"], rotated)
    np.testing.assert_allclose(got[0, 0], want, atol=1e-5)


@pytest.mark.parametrize("length", [1, 30])
def test_a_call_computes_what_is_cheaper(monkeypatch, tiny, length):
    """A step absorbs matrices, a chunk expands latents; by products counted in the program."""
    own = f"model.options=rank=24,shared={S},values={P}", f"model.head_size={K}"
    cfg = tiny(KEYS[0], *own, "model.depth=1", "model.positions=nope")
    layer, params = models.spec(cfg).layers[0], noisy(cfg)["layers"]["0"]
    block, x = models.decoder.block(layer), jax.random.normal(jax.random.key(0), (1, length, 32))
    one, context = jax.tree.map(lambda leaf: leaf[0], params), models.default_context((1, length))
    state = MIXERS["latent_attention"].init_state(layer, 1, 400, jnp.float32)

    def traced():
        """Products of a call and what comes of it; a function anew, as traces are remembered."""
        run = jax.jit(lambda x: block.apply(one, x, context, state, {})[0])
        return aot.work(run, x).flops, run(x)

    (chosen, got), found = traced(), {}
    for absorbed in (True, False):
        monkeypatch.setattr(latent, "_cheaper_absorbed", lambda *_, is_so=absorbed: is_so)
        found[absorbed], same = traced()
        np.testing.assert_allclose(same, got, atol=1e-5)
    assert chosen == found[length == 1] < found[length != 1]


def steps(cfg, params, dtype=None, chunk=0):
    state, got = models.init_state(cfg, 2, 20, dtype=dtype, chunk=chunk), []
    for at in range(20):
        logits, state = models.apply(cfg, params, TOKENS[:, at : at + 1], state=state)
        got.append(logits)
    return jnp.concatenate(got, 1)


def test_a_window_keeps_a_ring_of_latents(model):
    cfg = config.override(model.cfg, ["model.window=5"])
    want, _ = models.apply(cfg, model.params, TOKENS)
    assert models.init_state(cfg, 2, 20, chunk=1).layers[0].v_BGSK.shape[-2] == 5
    np.testing.assert_allclose(steps(cfg, model.params, chunk=1), want, atol=2e-5)


def test_caches_and_matrices_may_be_int8(model):
    """Near to what they round, which for matrices is what comes of the numbers they stand for."""
    want, _ = models.apply(model.cfg, model.params, TOKENS)
    rounded = np.abs(steps(model.cfg, model.params, dtype=jnp.int8) - want).max()
    assert 0 < rounded < 0.05 * np.abs(want).max()
    x = jax.random.normal(jax.random.key(0), (1, 1, model.cfg.model.width))
    layer = models.spec(model.cfg).layers[0]
    narrow = laid_out(model.params, "int8")["layers"]["0"][0]
    is_narrow = lambda leaf: isinstance(leaf, Int8)  # noqa: E731
    wide = jax.tree.map(lambda w: w.wide if is_narrow(w) else w, narrow, is_leaf=is_narrow)
    assert is_narrow(narrow["mixer"]["k_up"])

    @jax.jit
    def run(params):
        state = MIXERS["latent_attention"].init_state(layer, 1, 4, jnp.float32)
        block = models.decoder.block(layer)
        return block.apply(params, x, models.default_context((1, 1)), state, {})[0]

    np.testing.assert_allclose(run(narrow), run(wide), atol=2e-3 * np.abs(run(wide)).max())


def test_every_parameter_learns_and_has_a_rule(tiny):
    cfg = tiny(*KEYS[:1], f"{OPTIONS},query_rank={Q}", "model.depth=1")
    params = models.init(cfg, jax.random.key(0))
    parallel.shardings(params, parallel.make(cfg, jax.devices()[:1]))
    loss = lambda params: models.apply(cfg, params, TOKENS)[0].var()  # noqa: E731
    for path, gradient in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["model.kv_heads=1"], "kv_heads=1 in a layer of latent_attention.*heads=2: set it to 0"),
        (["model.biases=attention"], "biases=attention gives attention biases"),
        (["model.qk_norm=True"], "qk_norm=True in a layer of latent_attention"),
        (["model.positions=cope"], "CoPE reads scores or chooses keys"),
        (["model.options=shared=3"], "shared=3 is the part.*RoPE rotates in pairs: make it even"),
        (["model.head_size=1", "model.options="], "head_size=1 leaves latent_attention 0 numbers"),
        (["model.options=rank=-1"], "rank=-1 must lie from 0"),
        (["model.extension=step=0.5"], "model.pattern=latent_attention has none"),
    ],
)
def test_what_cannot_be_is_refused(tiny, keys, said):
    with pytest.raises(ConfigError, match=said):
        models.spec(config.override(tiny(*KEYS), keys))


@pytest.mark.slow
def test_the_engine_writes_what_the_whole_says(model):
    """Prompts that are read in one row, in chunks, and go to rows of their own."""
    prompts = [np.arange(n, dtype=np.int32) * 7 % 250 for n in (5, 21, 1)]
    greedy = Sampling(temperature=0, max_new_tokens=3)
    found = [[] for _ in prompts]
    for event in Engine(model, rows=2, chunk=8).run([Request(p, greedy) for p in prompts]):
        found[event.request].append(event.token)
    for prompt, new in zip(prompts, found, strict=True):
        row = np.zeros((1, 24), np.int32)
        row[0, : len(prompt) + 3] = [*prompt, *new]
        out, _ = models.apply(model.cfg, model.params, row)
        assert new == out[0, len(prompt) - 1 : len(prompt) + 2].argmax(-1).tolist()


def test_pages_are_refused(model):
    with pytest.raises(UserError, match="latent_attention keeps none: take cache=contiguous"):
        Engine(model, cache="paged")
