"""Blocks of attention and MLP that several layers use, as Zamba2 defines them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lcm import config, models, parallel
from lcm.decoding import Sampling
from lcm.decoding.engine import Engine
from lcm.decoding.requests import Request
from lcm.decoding.weights import laid_out
from lcm.errors import ConfigError
from lcm.models import encoder
from lcm.nn.dense import Int8
from lcm.training import optimizers

KEYS = (
    "model.depth=6",
    "model.unroll=1",
    "model.pattern=one,mamba2,two,mamba2",
    "model.mlp=none",
    "model.kinds.one.mixer=shared_attention",
    "model.kinds.one.mlp=geglu_exact",
    "model.kinds.one.positions=nope",
    "model.kinds.one.options=rank=3,adapted=True",
    "model.kinds.two.mixer=shared_attention",
    "model.kinds.two.mlp=swiglu",
    "model.kinds.two.options=block=1",
)
ROW = np.arange(20, dtype=np.int32)[None] * 7 % 250


def noisy(params):
    """Adapters begin at 0, and scales at 1, which hides them."""
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    return {**params, **{name: jax.tree.map(noise, params[name]) for name in ("layers", "blocks")}}


@pytest.fixture(scope="module")
def model():
    cfg = config.override(config.shrink(config.base()), KEYS)
    return cfg, noisy(models.init(cfg, jax.random.key(0)))


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def test_a_use_is_what_its_paper_defines(model):
    """Block 0 without positions, in float64, of a layer's own input."""
    cfg, params = model
    layer = models.spec(cfg).layers[0]
    own = jax.tree.map(lambda x: np.float64(x[0]), params["layers"]["0"])
    block = jax.tree.map(np.float64, params["blocks"]["0"])
    x, e = np.random.default_rng(0).standard_normal((2, 13, 32))
    shared = {"block": jax.tree.map(jnp.float32, block), "embedding": jnp.float32(e)[None]}
    context = models.default_context((1, 13))
    run = jax.jit(models.decoder.block(layer).apply)
    got, _ = run(jax.tree.map(jnp.float32, own), jnp.float32(x)[None], context, None, shared)

    a = own["mixer"]
    n = rms(np.concatenate([x, e], -1), block["norm"]["scale"])
    by_head = lambda name: (  # noqa: E731
        n @ (block[name] + a[f"{name}_down"] @ a[f"{name}_up"])
    ).reshape(13, 2, 32)
    q, k, v = map(by_head, "qkv")
    score = np.einsum("lhk,shk->hls", q, k) / np.sqrt(32)
    score = np.where(np.tril(np.ones((13, 13), bool)), score, -np.inf)
    share = np.exp(score - score.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    found = np.einsum("hls,shk->lhk", share, v).reshape(13, -1) @ block["out"]
    m = rms(found, block["mlp_norm"]["scale"])
    gate = m @ (block["mlp"]["gate"] + a["mlp_down"] @ a["gate_up"])
    up = m @ (block["mlp"]["up"] + a["mlp_down"] @ a["up_up"])
    gelu = np.asarray(jax.nn.gelu(jnp.asarray(gate), approximate=False))
    want = (gelu * up) @ block["mlp"]["down"] @ a["linear"]
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got[0], want, atol=2e-5 * np.abs(want).max())


def test_the_next_layer_reads_it_and_the_stream_does_not_have_it(model):
    cfg, params = model
    spec = models.spec(cfg)
    layers, context = spec.layers, models.default_context((1, 13))
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 13, 32))
    own = jax.tree.map(lambda leaf: leaf[0], params["layers"]["1"])
    run = jax.jit(models.decoder.block(layers[1]).apply)
    beside, _ = run(own, x, context, None, {"aside": y})
    added, _ = run(own, x + y, context, None, {})
    np.testing.assert_allclose(beside - x, added - (x + y), atol=1e-5)
    assert np.abs(beside - x).max() > 0.1


def test_a_block_exists_once_and_learns_from_all_its_uses(model):
    """Its gradient is the sum of those of copies that each use has for itself."""
    cfg, params = model
    assert list(params["blocks"]) == ["0", "1"]
    copy = [key.replace(".one", ".copy") for key in KEYS if ".one" in key]
    copy += ["model.kinds.copy.options=rank=3,adapted=True,block=2"]
    apart = config.override(cfg, ["model.pattern=one,mamba2,two,mamba2,copy,mamba2", *copy])
    place = [(n % 4, n // 4) for n in range(6)]
    layers = {
        str(n): jax.tree.map(lambda x, at=at: x[at : at + 1], params["layers"][str(kind)])
        for n, (kind, at) in enumerate(place)
    }
    blocks = {**params["blocks"], "2": params["blocks"]["0"]}

    def gradient(cfg, params):
        spec = models.spec(cfg)
        context = models.default_context(ROW.shape)
        loss = lambda p: models.decoder.apply(spec, p, ROW, context, None)[0].var()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    (value, once), (other, twice) = (
        gradient(cfg, params),
        gradient(apart, {**params, "layers": layers, "blocks": blocks}),
    )
    np.testing.assert_allclose(value, other, rtol=1e-5)
    both = jax.tree.map(jnp.add, twice["blocks"]["0"], twice["blocks"]["2"])
    for got, want, own in zip(
        *map(jax.tree.leaves, (once["blocks"]["0"], both, twice["blocks"]["2"])), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()) + 1e-8)
        assert jnp.abs(own).max() > 0


@pytest.mark.slow
def test_the_engine_writes_what_the_whole_says(model):
    cfg, params = model
    engine = Engine(types.SimpleNamespace(cfg=cfg, params=params, tokenizer=None), rows=2, chunk=8)
    prompts = [np.arange(n, dtype=np.int32) * 7 % 250 for n in (11, 1)]
    greedy = Sampling(temperature=0, max_new_tokens=3)
    found = [[], []]
    for event in engine.run([Request(prompt, greedy) for prompt in prompts]):
        found[event.request].append(event.token)
    for prompt, new in zip(prompts, found, strict=True):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(prompt) + 3] = [*prompt, *new]
        out, _ = models.apply(cfg, params, row)
        assert new == out[0, len(prompt) - 1 : len(prompt) + 2].argmax(-1).tolist()


def test_matrices_of_a_block_may_be_int8(model):
    """What comes out is that of the numbers they stand for."""
    cfg, params = model
    x, e = jax.random.normal(jax.random.key(0), (2, 1, 13, 32))
    own = jax.tree.map(lambda leaf: leaf[0], params["layers"]["0"])
    narrow = laid_out(params, "int8")["blocks"]["0"]
    assert isinstance(narrow["mlp"]["gate"], Int8)
    is_narrow = lambda leaf: isinstance(leaf, Int8)  # noqa: E731
    wide = jax.tree.map(lambda w: w.q * w.scale_F if is_narrow(w) else w, narrow, is_leaf=is_narrow)

    @jax.jit
    def run(block):
        shared, context = {"block": block, "embedding": e}, models.default_context((1, 13))
        layer = models.decoder.block(models.spec(cfg).layers[0])
        return layer.apply(own, x, context, None, shared)[0]

    want = run(wide)
    np.testing.assert_allclose(run(narrow), want, atol=1e-3 * np.abs(want).max())


SLOW = [
    pytest.param(f"model.{how}", marks=pytest.mark.slow) for how in ("unroll=0", "remat=offload")
]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["model.remat=full", *SLOW])
def test_remat_and_scan_change_no_gradient(model, how):
    cfg, params = model
    context = models.default_context(ROW.shape)

    def gradient(cfg):
        spec = models.spec(cfg)
        loss = lambda p: models.decoder.apply(spec, p, ROW, context, None)[0].var()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)["blocks"]

    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
    jax.tree.map(close, gradient(config.override(cfg, [how])), gradient(cfg))


def test_rules_and_optimisers_know_the_block(model):
    cfg, params = model
    mesh = parallel.make(cfg)
    spec = parallel.shardings(params, mesh)["blocks"]["0"]
    assert spec["q"].spec == P("fsdp", "tensor") and spec["mlp"]["down"].spec == P("tensor", "fsdp")
    dimensions = optimizers._muon_dimensions(params)["blocks"]["0"]
    assert dimensions["mlp"]["up"].reduction_axis == 0 and dimensions["norm"]["scale"] is None
    decayed = optimizers._decayed(params)["blocks"]["0"]
    assert decayed["q"] and not decayed["mlp_norm"]["scale"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["model.depth=5"], "has 'one', of shared_attention, with nothing behind it"),
        (["model.pattern=one,two,mamba2"], "has 'one', of shared_attention, with nothing"),
        (["model.kinds.two.options=block=0"], "block 0 of shared_attention has mlp=geglu_exact"),
        (["model.kinds.two.mlp=gelu"], "mlp=gelu in a layer of shared_attention"),
        (["model.kinds.one.options=adapted=True"], "adapted=True with rank=0"),
        (["model.post_norm=True"], "post_norm=True in a layer of shared_attention"),
    ],
)
def test_what_cannot_be_is_refused(model, keys, said):
    with pytest.raises(ConfigError, match=said):
        models.spec(config.override(model[0], keys))


def test_where_there_is_no_block_it_says_so(model):
    cfg, params = model
    with pytest.raises(ConfigError, match="has no block here"):
        encoder.encode_tokens(models.spec(cfg), params, ROW, models.default_context(ROW.shape))
