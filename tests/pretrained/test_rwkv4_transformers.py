"""RWKV-4 against transformers' own, live: with and without a cache, divided, written and read."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcm import decoding, models, pretrained

from . import cases

torch = pytest.importorskip("torch", reason="transformers computes with torch")
transformers = pytest.importorskip("transformers")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PREFILL = 15


def reference(**keys):
    """A model with decays from next to nothing to nearly all, keys of some size, shares of -0.1 to
    1.1."""
    transformers.logging.set_verbosity_error()
    sizes = {"vocab_size": cases.VOCAB, "hidden_size": 32, "intermediate_size": 40}
    sizes |= {"num_hidden_layers": 3, "context_length": cases.TRAINED, **cases.ENDS}
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**{**sizes, **keys}))
    draw = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise, shape = draw.standard_normal(parameter.shape), parameter.shape
            if "time_mix" in name:
                noise = draw.uniform(-0.1, 1.1, shape)
            elif "time_decay" in name:
                noise = 2 * noise - 2
            elif len(shape) > 1:
                noise *= (4 if "attention.key" in name else 1.5) * shape[-1] ** -0.5
            elif "time_first" not in name:
                noise = 0.3 * noise + name.endswith("weight")
            parameter.copy_(torch.from_numpy(noise))
    return model.eval()


def loaded(model, folder):
    """Ours of its folder, which is written before the first call divides its matrices."""
    model.save_pretrained(folder)
    return pretrained.load(folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    model = reference(rescale_every=2)
    return model, loaded(model, tmp_path_factory.mktemp("rwkv4"))


def theirs(model, tokens, **keys):
    with torch.no_grad():
        return model(torch.from_numpy(tokens), use_cache=False, **keys).logits.numpy()


def ours(model, tokens):
    return models.apply(model.cfg, model.params, jnp.asarray(tokens))[0]


def test_logits_are_those_of_transformers(both):
    model, own = both
    want = theirs(model, cases.tokens())
    assert np.std(want) > 0.2 and own.cfg.data.length == cases.TRAINED
    np.testing.assert_allclose(ours(own, cases.tokens()), want, **CLOSE)


def test_more_channels_than_the_stream_has(tmp_path):
    model = reference(attention_hidden_size=48, rescale_every=0)
    own = loaded(model, tmp_path / "in")
    np.testing.assert_allclose(
        ours(own, cases.tokens()), theirs(model, cases.tokens()), rtol=1e-5, atol=2e-5
    )


def test_a_cache_is_that_of_transformers(both):
    """One row: of several, their step of one token mixes rows."""
    model, own = both
    row, parts, got = cases.tokens()[:1], [], []
    cache, state = None, models.init_state(own.cfg, 1, cases.LENGTH)
    for first in (0, *range(PREFILL, cases.LENGTH)):
        piece = row[:, first : first + 1 if first else PREFILL]
        with torch.no_grad():
            out = model(torch.from_numpy(piece), use_cache=True, state=cache)
        cache, parts = out.state, [*parts, out.logits]
        logits, state = models.apply(own.cfg, own.params, jnp.asarray(piece), state=state)
        got.append(logits)
    assert sum(each.shape[1] for each in got) == cases.LENGTH
    np.testing.assert_allclose(np.concatenate(got, 1), torch.cat(parts, 1), **CLOSE)
    memory = state.layers[0].memory
    for name, found in zip(("num", "den", "m"), cache[2:], strict=True):
        np.testing.assert_allclose(memory[name], found.permute(2, 0, 1), **CLOSE)


def test_what_they_divide_changes_the_epsilon_of_norms_alone(tmp_path):
    """Halved after every layer, their stream is that of an epsilon 4 times as large each time."""
    model = reference(rescale_every=1, num_hidden_layers=5)
    own = loaded(model, tmp_path / "in")
    want = ours(own, cases.tokens())
    assert np.abs(theirs(model, cases.tokens()) - want).max() > 1e-3
    for n, block in enumerate(model.rwkv.blocks):
        for norm in (block.ln1, block.ln2):
            norm.eps /= 4**n
    model.rwkv.ln_out.eps /= 4**5
    np.testing.assert_allclose(theirs(model, cases.tokens()), want, rtol=1e-5, atol=2e-5)


def test_a_folder_of_ours_is_a_model_of_theirs(both, tmp_path):
    model, own = both
    out = pretrained.save_folder(own, tmp_path / "out")
    again, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert again.config.context_length == cases.TRAINED
    again.config.rescale_every = model.config.rescale_every
    got, want = theirs(again.eval(), cases.tokens()), theirs(model, cases.tokens())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(both):
    model, own = both
    (prompt,) = cases.tokens(19)[:1]
    with torch.no_grad():
        want = model.generate(
            torch.from_numpy(prompt[None]),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=cases.VOCAB,  # none of them
            pad_token_id=0,
        )
    (found,) = decoding.generate(
        own, [prompt], max_new_tokens=16, temperature=0.0, stop_ids=(),
        full="config", engine={"chunk": 8},
    )  # fmt: skip
    np.testing.assert_array_equal(found.tokens, want[0, 19:])
