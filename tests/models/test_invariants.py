"""What must hold for every mixer and position encoding, one loop over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import config, models
from lcm.types import Context

LENGTH = 24
# tests/positions has all encodings in one layer; these are one of each kind in a model.
ENCODINGS = ["nope", "rope", "alibi", "learned", "sinusoidal", "countdown+rope", "head_scale+t5"]
FIELDS = {
    "dynamic_ntk": ["factor=2", "original=8", f"length={LENGTH}"],  # ready for it, so at any depth
    "self_extend": ["group=2", "window=4"],
}
ENCODINGS += FIELDS
# Mixers with a matrix for a state.
MATRIX = {
    "linear_attention": ["model.options=normaliser=True"],
    "retnet": ["model.kv_heads=2", "model.options=decay=range"],
    "gla": [],
    "deltanet": ["model.options=negative=True"],
    "gated_deltanet": ["model.kv_heads=2"],
    "kda": [],
    "mlstm": ["model.options=input_bias=-0.5"],
}
VARIANTS = {
    "plain": [],
    "gqa, window, caps": [
        "model.heads=4",
        "model.kv_heads=2",
        "model.window=7",
        "model.score_cap=20",
        "model.logit_cap=30",
    ],
    "parts of pretrained models": [
        "model.norm=layer",
        "model.biases=all",
        "model.mlp=geglu",
        "model.qk_norm=True",
        "model.post_norm=True",
        "model.parallel=True",
        "model.score_scale=0.4",
        "model.embed_scale=5",
        "model.embed_norm=True",
    ],
    "experts": [
        "model.mlp=experts",
        "model.hidden=24",
        "model.mlp_options=count=5,top=2,normed=True,shared=12",
    ],
    "latent attention": [
        "model.pattern=latent_attention",
        "model.options=rank=40,shared=4,values=2,query_rank=9",  # chunks expand it, steps do not
    ],
    "experts by sigmoid": [
        "model.mlp=experts",
        "model.hidden=24",
        "model.mlp_options=count=5,shared=12,scores=sigmoid,corrected=True,shared_gate=False",
    ],
    "pattern with a rest": [
        "model.depth=5",
        "model.pattern=attention,local,bare",
        "model.kinds.local.mixer=attention",
        "model.kinds.local.window=5",
        "model.kinds.bare.mixer=attention",
        "model.kinds.bare.positions=nope",
    ],
    "mamba-2": ["model.pattern=mamba2", "model.mlp=none", "model.groups=2", "model.heads=4"],
    **{name: [f"model.pattern={name}", "model.heads=4", *keys] for name, keys in MATRIX.items()},
    "mamba-1": ["model.pattern=mamba1", "model.mlp=none", "model.recurrence_chunk=5"],
    "mamba-1, normed": ["model.pattern=mamba1", "model.options=normed=True,rank=3"],
    "gated-conv": ["model.pattern=gated_conv", "model.conv=3", "model.biases=all"],
    "min-gru": ["model.pattern=min_gru", "model.expand=1.5"],
    "min-lstm": ["model.pattern=min_lstm", "model.biases=all"],
    "lstm": ["model.pattern=lstm", "model.expand=1", "model.options=chrono=20"],
    "lru": ["model.pattern=lru", "model.options=r_min=0.5,r_max=0.9"],
    "s4d": ["model.pattern=s4d", "model.recurrence_chunk=5"],
    "s5": ["model.pattern=s5"],
    "slstm": ["model.pattern=slstm"],
    "mamba-3": ["model.pattern=mamba3", "model.groups=2", "model.heads=4"],
    "mamba-3, many": ["model.pattern=mamba3", "model.heads=4", "model.options=rank=3"],
    "rwkv-4": ["model.pattern=rwkv4,rwkv4_channels", "model.mlp=none", "model.norm=layer"],
    "rwkv-6": ["model.pattern=rwkv6,rwkv6_channels", "model.mlp=none", "model.norm=layer"],
    "rwkv-7": ["model.pattern=rwkv7,rwkv7_channels", "model.mlp=none", "model.norm=layer"],
    "windows": [
        "model.depth=5",
        "model.pattern=mamba2,rglru,mamba3,mlstm,rwkv4",
        "model.mlp=none",
        "model.extension=window=5,retain=0.9",
    ],
    "zamba-2": [
        "model.depth=4",
        "model.pattern=shared,mamba2",
        "model.mlp=none",
        "model.kinds.shared.mixer=shared_attention",
        "model.kinds.shared.mlp=geglu_exact",
        "model.kinds.shared.kv_heads=1",
        "model.kinds.shared.options=rank=3,adapted=True",
    ],
    "griffin": [
        "model.biases=all",
        "model.depth=3",
        "model.pattern=rglru,rglru,local",
        "model.kinds.rglru.mixer=rglru",
        "model.kinds.rglru.expand=1",
        "model.kinds.local.mixer=attention",
        "model.kinds.local.window=5",
    ],
}


# Every encoding in a plain model, and every shape of model with one encoding.
CASES = [(e, "plain") for e in ENCODINGS] + [("rope", v) for v in VARIANTS if v != "plain"]

# One of each kind of state.
VECTORS = "rwkv-6", "rwkv-7", "mamba-3", "lstm", "mamba-1", "griffin", "s4d", "s5", "slstm"
VECTORS += "rwkv-4", "gated-conv"
ALIKE = "plain", "latent attention", "mamba-2", "mamba-3, many", "windows", "zamba-2"
SHAPES = [("rope", v) for v in (*ALIKE, *VECTORS, *MATRIX)]
# Variants of one mixer. That steps equal the whole says of them that no token sees a later one; the
# gradients say it once more, and take longest to compile.
ALONE = [v for v in VARIANTS if VARIANTS[v] and VARIANTS[v][0].startswith("model.pattern=")]
GRADIENTS = [
    pytest.param(case, marks=pytest.mark.slow)
    if case[1] in ALONE and case[1] not in ("mamba-2", "mamba-3, many", "kda")
    else case
    for case in CASES
    if "experts" not in case[1]  # ragged_dot has no vmap, which jacobians are made by
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}", scope="module")
def model(request):
    encoding, variant = request.param
    cfg = config.shrink(config.base())
    if variant in ALONE:
        cfg.model.depth = len(VARIANTS[variant][0].split(","))  # one round: half to compile
    fields = [f"model.positions.{field}" for field in FIELDS.get(encoding, [])]
    cfg = config.override(cfg, [f"model.positions={encoding}", *fields, *VARIANTS[variant]])
    params, noise = models.init(cfg, jax.random.key(0)), jax.random.key(2)
    # Zeros and ones hide what they multiply.
    noisy = lambda x: x + 0.03 * jax.random.normal(noise, x.shape)  # noqa: E731
    return cfg, {**params, "layers": jax.tree.map(noisy, params["layers"])}


def tokens(rows: int, length: int = LENGTH, seed: int = 1) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, 256)


def context(rows: int, length: int = LENGTH) -> Context:
    """Documents that fill their row, with a countdown to its end."""
    plain = models.default_context((rows, length))
    return plain._replace(remaining_BL=length - 1 - plain.positions_BL)


@pytest.mark.quick("rope-griffin")
@pytest.mark.parametrize("model", GRADIENTS, indirect=True, ids=lambda case: f"{case[0]}-{case[1]}")
def test_causal_through_gradients(model):
    """No logit depends on the embedding of a later token, and each depends on its own."""
    cfg, params = model
    spec, at = models.spec(cfg), context(1)
    table = jnp.eye(LENGTH, cfg.model.vocab)  # token i is row i of the table, so rows are places

    def logits(embedding):
        own = params["embedding"]
        changed = {**params, "embedding": {**own, "table": own["table"] + embedding}}
        out, _ = models.decoder.apply(spec, changed, jnp.arange(LENGTH)[None], at, None)
        return out[0, :, -1]  # a column of the output that no input token uses

    jacobian = jax.jit(jax.jacrev(logits))(jnp.zeros_like(params["embedding"]["table"]))
    effect = np.abs(np.asarray(jacobian))[:, :LENGTH].sum(-1)
    assert table.shape[0] == LENGTH
    assert np.all(effect[np.triu_indices(LENGTH, 1)] == 0)
    assert np.all(np.diag(effect) > 0)


@pytest.mark.quick("rope-plain", "rope-griffin", "rope-gated_deltanet", "rope-latent attention")
def test_packed_row_equals_documents_alone(model):
    """Each document alone stands in a row of the same length, the rest of it padding."""
    cfg, params = model
    sizes = [5, 1, 11, 7]
    starts = np.cumsum([0, *sizes[:-1]])
    row = tokens(1)
    parts = [context(1, size) for size in sizes]
    packed = Context(
        jnp.concatenate([c.positions_BL for c in parts], 1),
        jnp.concatenate([jnp.full((1, n), i + 1) for i, n in enumerate(sizes)], 1),
        jnp.concatenate([c.remaining_BL for c in parts], 1),
    )
    together, _ = models.apply(cfg, params, row, packed)
    assert sum(sizes) == LENGTH
    for part, start, size in zip(parts, starts, sizes, strict=True):
        padded = jax.tree.map(lambda x, n=LENGTH - size: jnp.pad(x, ((0, 0), (0, n))), part)
        alone, _ = models.apply(cfg, params, jnp.roll(row, -start, 1), padded)
        got = together[:, start : start + size]
        np.testing.assert_allclose(got, alone[:, :size], atol=2e-5)


@pytest.mark.quick("rope-plain", "rope-mamba-2", "rope-gated_deltanet", "rope-griffin")
def test_padding_is_finite_and_seen_by_nobody(model):
    cfg, params = model
    row, at = tokens(1), context(1)
    hidden = at._replace(segments_BL=at.segments_BL.at[:, 16:].set(0))
    want, _ = models.apply(cfg, params, row, hidden)
    got, _ = models.apply(cfg, params, row.at[:, 16:].set(7), hidden)
    np.testing.assert_array_equal(got[:, :16], want[:, :16])
    assert np.all(np.isfinite(got))


@pytest.mark.quick(
    "rope-plain-*",
    "self_extend-plain-steps",
    "rope-pattern*steps",
    "rope-mamba-2-steps",
    "rope-gated_deltanet-chunks",
    "rope-griffin-chunks",
    "rope-rwkv-7-chunks",
    "rope-gated-conv-steps",
    "rope-latent attention-*",
)
@pytest.mark.parametrize("chunks", [[12, 12], [1] * LENGTH], ids=["chunks", "steps"])
def test_prefill_chunks_and_steps_equal_the_whole(model, chunks):
    cfg, params = model
    row, at = tokens(2), context(2)
    want, none = models.apply(cfg, params, row, at)
    assert none is None
    state, got, start = models.init_state(cfg, 2, LENGTH), [], 0
    for size in chunks:
        piece = slice(start, start + size)
        here = jax.tree.map(lambda x, piece=piece: x[:, piece], at)
        logits, state = models.apply(cfg, params, row[:, piece], here, state)
        got.append(logits)
        start += size
    np.testing.assert_allclose(jnp.concatenate(got, 1), want, atol=2e-5)
    assert state.used_B.tolist() == [LENGTH] * 2


@pytest.mark.quick(
    "rope-plain", "rope-mamba-2", "rope-griffin", "rope-windows", "rope-gated_deltanet"
)
@pytest.mark.parametrize("model", SHAPES, indirect=True, ids="-".join)
def test_padding_of_a_call_leaves_the_state_alone(model):
    """Rows of other lengths in one call, padded before or behind, go on as if each were alone."""
    cfg, params = model
    row, at = tokens(2), context(2)
    want, _ = models.apply(cfg, params, row, at)

    def take(x, start, end):
        behind, before = (jnp.pad(x[:, start:end], ((0, 0), pads)) for pads in ((0, 3), (3, 0)))
        return jnp.concatenate([behind[:1], before[1:]])

    state, got = models.init_state(cfg, 2, LENGTH), []
    for start, end in ((0, 9), (9, 18)):
        here = jax.tree.map(lambda x, a=start, b=end: take(x, a, b), at)
        logits, state = models.apply(cfg, params, take(row, start, end), here, state)
        got.append(jnp.stack([logits[0, :-3], logits[1, 3:]]))
    np.testing.assert_allclose(jnp.concatenate(got, 1), want[:, :18], atol=2e-5)
    assert state.used_B.tolist() == [18] * 2


def test_state_goes_on_where_it_ends_without_a_context(tiny):
    cfg = tiny()
    params, row = models.init(cfg, jax.random.key(0)), tokens(2)
    state = models.init_state(cfg, 2, LENGTH)
    first, state = models.apply(cfg, params, row[:, :10], state=state)
    second, _ = models.apply(cfg, params, row[:, 10:], state=state)
    want, _ = models.apply(cfg, params, row)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), want, atol=2e-5)


@pytest.mark.quick("offload")
@pytest.mark.parametrize("remat", ["dots", "full", "offload"])
def test_remat_changes_no_gradient(tiny, remat):
    row = tokens(2)

    def gradient(cfg):
        spec = models.spec(cfg)
        params = models.init(cfg, jax.random.key(0))
        loss = lambda p: models.decoder.apply(spec, p, row, context(2), None)[0].var()  # noqa: E731
        return jax.jit(jax.grad(loss))(params), str(jax.make_jaxpr(jax.grad(loss))(params))

    (want, plain), (got, again) = gradient(tiny()), gradient(tiny(f"model.remat={remat}"))
    assert "remat" in again and "remat" not in plain
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


def test_unrolling_changes_nothing(tiny):
    cfg = tiny("model.depth=4")
    params, row = models.init(cfg, jax.random.key(0)), tokens(2)
    want, _ = models.apply(config.override(cfg, ["model.unroll=1"]), params, row)
    for unroll in (2, 4, 9):
        got, _ = models.apply(config.override(cfg, [f"model.unroll={unroll}"]), params, row)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_bf16_computes_in_bf16_and_scores_in_fp32(tiny):
    cfg = tiny("model.dtype=bfloat16")
    params, row = models.init(cfg, jax.random.key(0)), tokens(2)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits, _ = models.apply(cfg, params, row)
    want, _ = models.apply(tiny(), params, row)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - want).max() < 0.1
    text = str(jax.make_jaxpr(lambda p: models.apply(cfg, p, row)[0])(params))
    assert "bf16" in text
