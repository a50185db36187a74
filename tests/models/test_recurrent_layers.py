"""Recurrent layers: weights from elsewhere, what is published of them, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lcm import models, parallel, training
from lcm.errors import ConfigError
from lcm.types import Context

MAMBA2 = ["model.pattern=mamba2", "model.mlp=none"]
RGLRU = ["model.pattern=rglru", "model.expand=1.5"]


@pytest.mark.parametrize("groups", [1, 2])
def test_logits_of_mamba_2_are_those_of_transformers(tiny, groups):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 8}
    heads = {"num_heads": 4, "head_dim": 16, "n_groups": groups, "chunk_size": 8}
    theirs = transformers.Mamba2Model(transformers.Mamba2Config(**sizes, **heads)).eval()
    for name, parameter in theirs.named_parameters():  # zeros and ones would hide what is swapped
        if name.endswith(("bias", "D", "norm.weight", "norm_f.weight", "A_log")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    cfg = tiny(*MAMBA2, "model.heads=4", f"model.groups={groups}", "model.vocab=50")
    cfg.model.norm_eps = 1e-5
    weights = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    layers = [_layer(weights, n, 64) for n in range(2)]
    params = {
        "embedding": {"table": weights["embeddings.weight"]},
        "final_norm": {"scale": weights["norm_f.weight"]},
        "layers": {"0": jax.tree.map(lambda *x: np.stack(x), *layers)},
    }
    models.check_params(cfg, params)
    row = np.random.default_rng(0).integers(0, 50, (2, 21))
    got, _ = models.apply(cfg, params, jnp.asarray(row))
    with torch.no_grad():
        hidden = theirs(torch.tensor(row)).last_hidden_state.numpy()
    np.testing.assert_allclose(got, hidden @ weights["embeddings.weight"].T, atol=1e-4)


def _layer(weights, n, inner):
    """One layer of theirs: z, x, B and C, dt in one matrix, and x, B and C in one convolution."""
    own = {k.split(".", 2)[2]: w for k, w in weights.items() if k.startswith(f"layers.{n}.")}
    heads = len(own["mixer.D"])
    cuts = inner, 2 * inner, len(own["mixer.in_proj.weight"]) - heads
    z, x, bc, dt = np.split(own["mixer.in_proj.weight"].T, cuts, 1)
    conv_x, conv_bc = np.split(own["mixer.conv1d.weight"].transpose(2, 1, 0), [inner], 2)
    conv_x_bias, conv_bc_bias = np.split(own["mixer.conv1d.bias"], [inner])
    convolutions = {"conv_x": conv_x, "conv_bc": conv_bc}
    biases = {"conv_x_bias": conv_x_bias, "conv_bc_bias": conv_bc_bias}
    numbers = {name: own[f"mixer.{name}"] for name in ("A_log", "D", "dt_bias")}
    out, norm = own["mixer.out_proj.weight"].T, {"scale": own["mixer.norm.weight"]}
    matrices = {"z": z, "x": x, "bc": bc, "dt": dt, "out": out, "norm": norm}
    mixer = {**matrices, **convolutions, **biases, **numbers}
    return {"mixer_norm": {"scale": own["norm.weight"]}, "mixer": mixer}


def test_initial_decays_are_as_published(tiny):
    cfg = tiny(*MAMBA2, "model.depth=1", "model.width=128", "model.heads=64")
    mixer = models.init(cfg, jax.random.key(0))["layers"]["0"]["mixer"]
    decay, dt = jnp.exp(mixer["A_log"]), jax.nn.softplus(mixer["dt_bias"])
    assert 1 <= decay.min() < 2 and 15 < decay.max() <= 16
    assert 1e-3 <= dt.min() < 2e-3 and 0.07 < dt.max() <= 0.1
    cfg = tiny(*RGLRU, "model.depth=1", "model.width=128")
    mixer = models.init(cfg, jax.random.key(0))["layers"]["0"]["mixer"]
    a = jnp.exp(-jax.nn.softplus(mixer["a_param"]))
    assert 0.9 <= a.min() < 0.905 and 0.995 < a.max() <= 0.9991


@pytest.mark.quick("rg-lru")
@pytest.mark.parametrize("keys", [MAMBA2, RGLRU], ids=["mamba-2", "rg-lru"])
def test_every_parameter_has_a_rule_and_learns(tiny, keys):
    cfg = tiny(*keys, "model.depth=1", "model.biases=all", "train.optimizer=muon")
    training.abstract_state(cfg, parallel.make(cfg, jax.devices()[:1]))  # finds a rule for each
    spec, params = models.spec(cfg), models.init(cfg, jax.random.key(0))
    row, at = jnp.arange(24).reshape(2, 12), models.default_context((2, 12))
    padded = at._replace(segments_BL=at.segments_BL.at[:, 8:].set(0))

    def loss(params):
        logits, _ = models.decoder.apply(spec, params, row, padded, None)
        return jax.nn.log_softmax(logits)[:, :8, 3].sum()

    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        name = parallel.path(path)
        assert np.all(np.isfinite(leaf)), name
        assert jnp.abs(leaf).max() > 0, name


def test_cost(tiny):
    for keys in (MAMBA2, RGLRU):
        cfg = tiny(*keys)
        assert models.state_bytes_per_token(cfg) == 0
        assert models.flops_per_token(cfg, 16) == models.flops_per_token(cfg, 4096)


REFUSED = {
    "model.heads=5": "model.heads=5 does not divide 64 channels .* take one of 1, 2, 4",
    "model.expand=1.3": "41.6 channels .*choose model.expand so that they are whole",
    "model.head_size=48": "head_size=48 times model.heads=2 is not 64 .*: take head_size=32",
    "model.groups=3": "model.groups=3 does not divide model.heads=2",
    "model.conv=0": "model.conv=0 must be more than 0",
    "model.recurrence_chunk=-1": "model.recurrence_chunk=-1 is negative: 0 chooses it",
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused(tiny, key):
    with pytest.raises(ConfigError, match=REFUSED[key]):
        models.spec(tiny(*MAMBA2, key))


def test_heads_of_a_recurrence_may_be_odd(tiny):
    """RoPE, which models have if nothing is said, turns pairs, but none here."""
    assert models.spec(tiny(*MAMBA2, "model.heads=64")).layers[0].head_size == 1
    with pytest.raises(ConfigError, match="head_size=1 is odd"):
        models.spec(tiny("model.mixer=attention", "model.heads=32"))
    with pytest.raises(ConfigError, match="length=31 is shorter"):
        models.spec(tiny(*MAMBA2, "model.positions=learned", "model.positions.length=31"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"state": 1.5}, "model.kinds.a.state=1.5 is of type float, int is wanted"),
        ({"options": 5}, "options=5 is of type int, str is wanted"),
        ({"qk_norm": "yes"}, "qk_norm='yes' is of type str, bool is wanted"),
        ({"expand": float("nan")}, "nan channels"),
    ],
)
def test_kinds_made_in_python_have_the_types_of_the_model(tiny, keys, message):
    cfg = tiny()
    cfg.model.kinds = ConfigDict({"a": {"mixer": "mamba2", "expand": 2}})  # for 2.0
    cfg.model.pattern = ("a",)
    models.spec(cfg)
    cfg.model.kinds = ConfigDict({"a": {"mixer": "mamba2", **keys}})
    with pytest.raises(ConfigError, match=message):
        models.spec(cfg)


def test_states_of_another_config_are_refused(tiny):
    cfg = tiny(*MAMBA2)
    params, row = models.init(cfg, jax.random.key(0)), jnp.zeros((2, 4), jnp.int32)
    others = {
        "of another config, this layer has": tiny(*MAMBA2, "model.state=4"),
        "2 of attention with 2 heads of 16 and 16, this one has 2 recurrent": tiny(),
        "of 3 recurrent, this one has 2 recurrent": tiny(*MAMBA2, "model.depth=3"),
        "1 recurrent [+] 1 of attention": tiny("model.pattern=mamba2,attention"),
    }
    for message, other in others.items():
        state = models.init_state(other, 2, 16)
        with pytest.raises(ValueError, match=message):
            models.apply(cfg, params, row, state=state)
    with pytest.raises(ValueError, match="a state of 3 rows for 2 rows"):
        models.apply(cfg, params, row, state=models.init_state(cfg, 3, 16))
    with pytest.raises(ValueError, match="the state is a tuple"):
        models.apply(cfg, params, row, state=state.layers)
    with pytest.raises(ConfigError, match=r"of another model: layers/0/mixer/.* is absent"):
        models.apply(tiny(), params, row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_BL": np.zeros((2, 0), np.int32)}, r"shape \(2, 0\): give \[B, L\], one row"),
        ({"tokens_BL": np.zeros((0, 4), np.int32)}, r"shape \(0, 4\)"),
        ({"tokens_BL": np.zeros((2, 4))}, "tokens are float64: give an array of int32"),
        ({"tokens_BL": [[1, 2]]}, "tokens are a list"),
        ({"segments_BL": np.ones((2, 4))}, "segments are float64"),
        ({"segments_BL": np.ones((2, 4), bool)}, "segments are bool"),
        ({"segments_BL": np.ones((2, 3), int)}, r"segments \(2, 3\) for tokens \(2, 4\)"),
    ],
)
def test_what_is_read_is_integers_for_each_token(tiny, change, message):
    given = models.default_context((2, 4))._asdict() | {"tokens_BL": np.zeros((2, 4), int)} | change
    row = given.pop("tokens_BL")
    with pytest.raises(ValueError, match=message):
        models.apply(tiny(*MAMBA2), {}, row, Context(**given))
