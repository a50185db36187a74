"""Logits of every family as transformers has them: by golden values, and live where torch is."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcm import config, models, positions
from lcm.models import decoder
from lcm.nn.experts import imbalance
from lcm.training import workdir
from lcm.types import Context

from . import cases, make_golden

GOLDEN = np.load(make_golden.FOLDER / "logits.npz")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SLOW = {name: pytest.mark.slow for name in cases.SECOND}
NAMES = [pytest.param(n, marks=SLOW[n]) if n in SLOW else n for n in cases.CONFIGS]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(loaded, name):
    cfg, params, *_ = loaded(name)
    models.check_params(cfg, params)
    got, _ = models.apply(cfg, params, jnp.asarray(cases.tokens()))
    assert np.std(GOLDEN[name]) > 0.2
    np.testing.assert_allclose(got[:, make_golden.PLACES], GOLDEN[name], **CLOSE)


# One of each kind of layer always, the others with `-m slow`.
CACHED = ("llama, llama3", "mistral", "qwen2", "gemma3", "gpt_neox", "bloom")
CACHED += ("mamba", "mamba2", "recurrent_gemma", "qwen3_next", "zamba2, blocks", "jamba, experts")
CACHED += ("olmo_hybrid", "falcon_mamba", "xlstm", "bamba", "granite", "kimi_linear", "lfm2")
OTHERS = [n for n in cases.CONFIGS if n not in (*CACHED, *cases.BY_LENGTH)]


@pytest.mark.quick("mamba2", "llama, llama3")
@pytest.mark.parametrize(
    "name", [*CACHED, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_a_cache_changes_nothing(loaded, name):
    """The first tokens in one chunk, the next one by one, the rest in another chunk."""
    cfg, params, *_ = loaded(name)
    row, state, got, start = jnp.asarray(cases.tokens()), None, [], 0
    state = models.init_state(cfg, 2, cases.LENGTH)
    for size in (16, 1, 1, 1, 1, 1, 1, 1, 1, 16):
        some, state = models.apply(cfg, params, row[:, start : start + size], state=state)
        got.append(some)
        start += size
    assert start == cases.LENGTH
    got = np.concatenate(got, 1)[:, make_golden.PLACES]
    np.testing.assert_allclose(got, GOLDEN[name], **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_live_transformers_agree(loaded, name):
    """With the release that is installed; shorter too where that is not the whole cut short."""
    pytest.importorskip("torch", reason="transformers computes with torch: golden values only")
    pytest.importorskip("transformers")
    reference, (cfg, params, *_) = make_golden.reference(name), loaded(name)
    for length in (cases.LENGTH, *([cases.SHORT] if name in cases.BY_LENGTH else [])):
        row = cases.tokens(length)
        got, _ = models.apply(cfg, params, jnp.asarray(row))
        np.testing.assert_allclose(got, make_golden.logits(reference, row), **CLOSE)


@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("name", ["jamba, experts", "qwen3_next, experts"])
def test_live_transformers_find_the_same_imbalance(loaded, name, padding):
    torch = pytest.importorskip("torch", reason="transformers computes with torch")
    pytest.importorskip("transformers")
    reference, (cfg, params, *_) = make_golden.reference(name), loaded(name)
    tokens = cases.tokens()
    there = np.ones_like(tokens)
    there[1, tokens.shape[1] - padding :] = 0  # of one row, behind its text
    mask = torch.from_numpy(there) if padding else None
    with torch.no_grad():
        want = reference(
            torch.from_numpy(tokens), attention_mask=mask, output_router_logits=True
        ).aux_loss
    spec, places = models.spec(cfg), jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    context = Context(places, jnp.int32(there), jnp.full_like(places, -1))
    _, _, load = decoder.hidden_and_load(spec, params, jnp.asarray(tokens), context, None)
    assert load.tokens.tolist() == [there.sum()] * len(load.tokens) and len(load.tokens) > 1
    assert float(imbalance(load)) == pytest.approx(want.item(), rel=1e-5)
    assert spec.balance == reference.config.router_aux_loss_coef > 0


def test_a_config_extends_a_model_as_a_checkpoint_does(loaded):
    """The same weights under another encoding are the model whose config.json asks for it."""
    cfg, params, *_ = loaded("llama")
    cfg = cfg.copy_and_resolve_references()
    yarn = positions.YaRN(base=100.0, factor=4.0, original=cases.TRAINED)
    with cfg.model.unlocked():
        cfg.model.positions = positions.config(yarn)
    got, _ = models.apply(cfg, params, jnp.asarray(cases.tokens()))
    np.testing.assert_allclose(got[:, make_golden.PLACES], GOLDEN["llama, yarn"], **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_the_config_is_one_that_a_run_keeps(loaded, tmp_path, name):
    cfg = loaded(name).cfg
    config.check_keys(cfg)
    workdir.write_config(tmp_path, cfg)
    assert models.spec(workdir.read_config(tmp_path)) == models.spec(cfg)


def test_trained_context_and_patterns(loaded):
    assert loaded("llama").cfg.data.length == cases.TRAINED
    assert loaded("phi3, longrope").cfg.data.length == 64
    assert loaded("mpt").cfg.data.length == 64
    gemma = loaded("gemma3").cfg.model
    assert gemma.pattern == (*["sliding_attention"] * 2, "full_attention")
    assert gemma.positions.name == "linear"  # of the layers that see all: extending leaves others
    assert gemma.kinds.sliding_attention.positions.base == 10.0
    assert loaded("gemma2").cfg.model.kinds.to_dict() == {
        "sliding_attention": {"window": cases.WINDOW},
        "full_attention": {},
    }
