"""Compressed contexts: what is kept of each segment, and how a decoder reads it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import models
from lcm.errors import ConfigError
from lcm.models import compression, decoder

SIZES = ("model.width=8", "model.heads=2", "model.vocab=20", "model.hidden=8")


def made(tiny, segment=8, ratio=4, encoder_depth=2):
    network = lambda depth: models.spec(tiny(*SIZES, f"model.depth={depth}"))  # noqa: E731
    spec = compression.CompressionSpec(network(encoder_depth), network(2), segment, ratio)
    return spec, compression.init(spec, jax.random.key(0))


def text(length, seed=1):
    return jax.random.randint(jax.random.key(seed), (2, length), 0, 20)


def test_vectors_are_the_states_of_every_layer_and_segments_are_apart(tiny):
    spec, params = made(tiny)
    tokens = text(16)
    vectors = compression.compress(spec, params, tokens)
    assert vectors.shape == (2, spec.prefix(16), 3, 8) and spec.prefix(16) == 4
    changed = compression.compress(spec, params, tokens.at[:, 12].add(1) % 20)
    np.testing.assert_array_equal(vectors[:, :2], changed[:, :2])
    assert np.abs(np.asarray(vectors - changed))[:, 3].max() > 0
    # The last layer's, with the final norm, is what the encoder itself gives.
    own = models.default_context((2, 8))
    hidden, _ = decoder.hidden(spec.encoder, params["encoder"], tokens[:, 8:], own, None)
    last = decoder.final_norm(spec.encoder, params["encoder"], vectors[:, 2:, -1])
    np.testing.assert_allclose(last, hidden[:, 3::4], atol=1e-5)
    table = params["encoder"]["embedding"]["table"]
    np.testing.assert_allclose(vectors[:, :, 0], table[tokens[:, 3::4]], atol=1e-6)


def test_deeper_encoders_give_means_of_their_layers(tiny):
    spec, params = made(tiny, encoder_depth=4)
    vectors = compression.compress(spec, params, text(8))
    every = compression._layers(spec.encoder, params["encoder"], text(8), None)[1][:, :, 3::4]
    assert vectors.shape == (2, 2, 3, 8)
    np.testing.assert_allclose(vectors[:, :, 1], (every[1] + every[2]) / 2, atol=1e-6)
    np.testing.assert_allclose(vectors[:, :, 2], (every[3] + every[4]) / 2, atol=1e-6)


def test_ratio_one_and_an_identity_is_the_decoder_on_the_text(tiny):
    """Copied weights: the prefix begins with the text's own embeddings."""
    spec, params = made(tiny, ratio=1)
    params["decoder"] = params["encoder"]
    params["maps"]["embed"] = jnp.eye(8)
    tokens, prompt = text(8), text(3, seed=2)
    got = compression.read(spec, params, compression.compress(spec, params, tokens), prompt)
    both = jnp.concatenate([tokens, prompt], axis=1)
    context = models.default_context(both.shape)
    want, _ = decoder.apply(spec.decoder, params["decoder"], both, context, None)
    np.testing.assert_allclose(got, want[:, 8:], atol=1e-4)


def test_every_layer_s_map_reaches_the_prompt_but_not_the_last(tiny):
    """What is added after the last layer is to places that no layer reads any more."""
    spec, params = made(tiny)
    vectors, prompt = compression.compress(spec, params, text(8)), text(3, seed=2)

    def loss(params):
        return (compression.read(spec, params, vectors, prompt) ** 2).sum()

    gradient = jax.grad(loss)(params)["maps"]
    assert np.abs(gradient["embed"]).max() > 0
    assert np.abs(gradient["layers"][0]).max() > 0
    assert (gradient["layers"][1] == 0).all()


def test_a_frozen_encoder_gets_no_gradient_through_kept_vectors(tiny):
    spec, params = made(tiny)

    def loss(params, frozen):
        vectors = compression.compress(spec, params, text(8))
        vectors = jax.lax.stop_gradient(vectors) if frozen else vectors
        return (compression.read(spec, params, vectors, text(3, seed=2)) ** 2).sum()

    for frozen in (True, False):
        gradient = jax.grad(loss)(params, frozen)["encoder"]
        assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient)) != frozen


def test_texts_fill_segments():
    row = jnp.arange(5)[None]
    assert compression.filled(row, 8)[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert compression.filled(row, 3)[0].tolist() == [4, 0, 1, 2, 3, 4]
    assert compression.filled(row, 5)[0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="0 tokens"):
        compression.filled(row[:, :0], 4)


def test_sizes_that_do_not_go_together_are_refused(tiny):
    with pytest.raises(ConfigError, match="ratio 3 does not divide segments of 8"):
        made(tiny, ratio=3)
    with pytest.raises(ConfigError, match="depth 3 for a decoder of 2"):
        made(tiny, encoder_depth=3)
