"""Compressed contexts: what is kept of each segment, and how a decoder reads it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcm import models
from lcm.errors import ConfigError
from lcm.models import compression, decoder

SIZES = ("model.width=8", "model.heads=2", "model.vocab=20", "model.hidden=8")


def made(tiny, segment=8, ratio=4, encoder_depth=2, every=True):
    network = lambda depth: models.spec(tiny(*SIZES, f"model.depth={depth}"))  # noqa: E731
    spec = compression.CompressionSpec(network(encoder_depth), network(2), segment, ratio, every)
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


@pytest.mark.slow
def test_every_layer_s_map_reaches_the_prompt_but_not_the_last(tiny):
    """What is added after the last layer is to places that no layer reads any more."""
    spec, params = made(tiny)
    vectors, prompt = compression.compress(spec, params, text(8)), text(3, seed=2)

    def loss(params):
        return (compression.read(spec, params, vectors, prompt) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(params)["maps"]
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
        gradient = jax.jit(jax.grad(loss), static_argnums=1)(params, frozen)["encoder"]
        assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient)) != frozen


def test_texts_fill_segments():
    row = jnp.arange(5)[None]
    assert compression.filled(row, 8)[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert compression.filled(row, 3)[0].tolist() == [4, 0, 1, 2, 3, 4]
    assert compression.filled(row, 5)[0].tolist() == [0, 1, 2, 3, 4]
    for nothing in (row[:, :0], row[:0], row[0]):
        with pytest.raises(ValueError, match=r"have nothing to compress: give \[B, N\]"):
            compression.filled(nothing, 4)


def test_sizes_that_do_not_go_together_are_refused(tiny):
    with pytest.raises(ConfigError, match="ratio 3 does not divide segments of 8"):
        made(tiny, ratio=3)
    with pytest.raises(ConfigError, match="depth 3 for a decoder of 2"):
        made(tiny, encoder_depth=3)
    spec, _ = made(tiny)
    width = spec.encoder.width
    for shape in ((1, 4, 3, width), (2, 4, 1, width), (2, 4, 3, width + 1)):
        with pytest.raises(ValueError, match=rf"before a prompt .*give \[B, P, 3, {width}\]"):
            compression.read(spec, {}, jnp.zeros(shape), jnp.zeros((2, 3), jnp.int32))


TASK = compression.Task(share=1.0, excerpt=(2, 3), answer=4)


def counting(rows=64, length=13):
    """Rows whose tokens tell where they stand."""
    return jnp.broadcast_to(jnp.arange(length), (rows, length))


def test_a_text_said_again_is_weighed_behind_its_excerpt():
    asked = compression.ask(TASK, jax.random.key(0), counting(), 8)
    assert asked.text_BN.shape == (64, 8) and asked.tokens_BL.shape == (64, TASK.places)
    np.testing.assert_array_equal(asked.targets_BL, asked.tokens_BL + 1)
    assert asked.targets_BL[asked.weight_BL > 0].max() == 7  # the text's last
    np.testing.assert_array_equal(asked.weight_BL.sum(1), 4)
    first_B = asked.weight_BL.argmax(1)
    assert set(np.asarray(first_B)) == {1, 2}  # behind excerpts of 2 and of 3 tokens
    for row, at in zip(asked.weight_BL, first_B, strict=True):
        np.testing.assert_array_equal(row[at : at + 4], 1)
    assert set(np.asarray(asked.tokens_BL[:, 0])) == {0, 1}  # all places with room for both


def test_a_text_gone_on_is_weighed_from_what_follows():
    asked = compression.ask(TASK._replace(share=0.0), jax.random.key(0), counting(), 8)
    np.testing.assert_array_equal(asked.tokens_BL[:, :4], counting()[:, 8:12])
    np.testing.assert_array_equal(asked.targets_BL[:, :4], counting()[:, 9:13])
    np.testing.assert_array_equal(asked.weight_BL, counting()[:, :6] < 4)


def test_shares_are_of_rows():
    asked = compression.ask(TASK._replace(share=0.75), jax.random.key(0), counting(), 8)
    assert abs(float((asked.tokens_BL[:, 0] < 8).mean()) - 0.75) < 0.15


@pytest.mark.parametrize(
    ("change", "length", "message"),
    [
        ({"share": 1.5}, 8, "share=1.5"),
        ({"excerpt": (3, 2)}, 8, "least first"),
        ({"answer": 0}, 8, "an answer of one"),
        ({"answer": 6}, 8, "take texts of 9 or more"),
        ({}, 9, "rows of 14"),
    ],
)
def test_tasks_without_room_are_refused(change, length, message):
    with pytest.raises(ConfigError, match=message):
        compression.ask(TASK._replace(**change), jax.random.key(0), counting(), length)


def test_the_excerpt_is_read_but_not_scored(tiny):
    spec, params = made(tiny)
    asked = compression.ask(TASK, jax.random.key(0), text(13), 8)
    value = compression.loss(spec, params, asked)
    shift = (asked.weight_BL == 0).astype(jnp.int32)
    moved = asked._replace(targets_BL=(asked.targets_BL + shift) % 20)
    np.testing.assert_array_equal(value, compression.loss(spec, params, moved))
    other = asked._replace(tokens_BL=asked.tokens_BL.at[:, 0].add(1) % 20)
    assert value != compression.loss(spec, params, other)
    nll_BL, _ = compression.answered(spec, params, asked)
    np.testing.assert_allclose(value, nll_BL[asked.weight_BL > 0].mean(), rtol=1e-6)


def test_the_second_stage_leaves_the_encoder_to_the_bit(tiny):
    spec, params = made(tiny)
    asked = compression.ask(TASK, jax.random.key(0), text(13), 8)
    assert compression.apart(params, 1) == (params, {})
    moving, kept = compression.apart(params, 2)
    rule = optax.adamw(1e-2, weight_decay=0.1)
    gradient = jax.jit(jax.grad(lambda moving: compression.loss(spec, moving | kept, asked)))(
        moving
    )
    updates, _ = rule.update(gradient, rule.init(moving), moving)
    after = optax.apply_updates(moving, updates) | kept
    assert set(after) == set(params)
    same = jax.tree.map(lambda x, y: bool((x == y).all()), after, params)
    assert all(jax.tree.leaves(same["encoder"]))
    assert not all(jax.tree.leaves(same["decoder"])) and not same["maps"]["embed"]
    with pytest.raises(ConfigError, match="stage 3"):
        compression.apart(params, 3)


def test_the_last_layer_alone_stands_in_place_of_embeddings(tiny):
    spec, params = made(tiny, every=False)
    vectors = compression.compress(spec, params, text(16))
    assert vectors.shape == (2, 4, 1, 8) and not params["maps"]["layers"].size
    every = compression.compress(made(tiny)[0], params, text(16))
    np.testing.assert_allclose(vectors[:, :, 0], every[:, :, -1], atol=1e-6)
    with_map = params | {"maps": {"embed": params["maps"]["embed"], "layers": jnp.zeros((2, 8, 8))}}
    alike = jnp.repeat(vectors, 3, axis=2)
    np.testing.assert_allclose(
        compression.read(spec, params, vectors, text(3, seed=2)),
        compression.read(made(tiny)[0], with_map, alike, text(3, seed=2)),
        atol=1e-6,
    )
