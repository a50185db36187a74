"""Layers that read grids in orders of their own, and vectors of texts made by them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm import models
from lcm.errors import ConfigError
from lcm.models import decoder, encoder, retriever
from lcm.nn.orders import grid_orders, reordered, reordered_context, restored
from lcm.types import Context

MAMBA = ("model.pattern=mamba2", "model.mlp=none", "model.depth=2", "model.vocab=20")
SIZES = ("model.width=8", "model.heads=2", "model.state=4")
embed = jax.jit(retriever.embed, static_argnums=0)
loss_of = jax.jit(retriever.loss, static_argnums=0)
GRIDS = [(6,), (2, 3), (3, 3), (2, 3, 4)]


@pytest.mark.parametrize("grid", GRIDS)
def test_orders_are_undone(grid):
    x = jax.random.normal(jax.random.key(0), (2, int(np.prod(grid)), 3))
    for order in grid_orders(grid):
        np.testing.assert_array_equal(restored(reordered(x, order), order), x)
        np.testing.assert_array_equal(reordered(x, order), x[:, order])


def test_orders_are_those_published():
    """`reverse = i % 2 == 1`, `transpose = i % 4 >= 2`; (t h w), (t w h), (w h t) of videos."""
    image = np.arange(6).reshape(2, 3)
    want = [image, image.ravel()[::-1], image.T, image.T.ravel()[::-1]]
    assert [list(o) for o in grid_orders((2, 3))] == [list(np.ravel(w)) for w in want]
    video = np.arange(24).reshape(2, 3, 4)
    axes = [video, video.transpose(0, 2, 1), video.transpose(2, 1, 0)]
    assert [list(o) for o in grid_orders((2, 3, 4))[::2]] == [list(a.ravel()) for a in axes]
    assert [list(o) for o in grid_orders((2, 3, 4))[1::2]] == [list(a.ravel()[::-1]) for a in axes]
    one_row = grid_orders((1, 5))
    np.testing.assert_array_equal(one_row[0], one_row[2])
    np.testing.assert_array_equal(one_row[0], grid_orders((5,))[0])


@pytest.mark.parametrize("grid", [(0,), (2, 0), (1, 2, 3, 4), ()])
def test_grids_without_orders_are_refused(grid):
    with pytest.raises(ConfigError, match="1 to 3 axes"):
        grid_orders(grid)


def test_positions_count_anew_in_each_document_of_an_order():
    segments = jnp.array([[1, 1, 2, 2, 2, 0]])
    context = Context(jnp.array([[0, 1, 0, 1, 2, 0]]), segments, -jnp.ones_like(segments))
    back = reordered_context(context, grid_orders((6,))[1])
    assert back.segments_BL.tolist() == [[0, 2, 2, 2, 1, 1]]
    assert back.positions_BL.tolist() == [[0, 0, 1, 2, 0, 1]]
    assert reordered_context(context, grid_orders((6,))[0]) is context


def made(tiny, *overrides, length=6):
    cfg = tiny(*MAMBA, *SIZES, *overrides)
    spec = models.spec(cfg)
    params = decoder.init(spec, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, length), 1, 20)
    return spec, params, tokens


def influence(spec, params, grid, length):
    """Whether what the first layer reads at each place changes each output, `[to, from]`."""
    x = jax.random.normal(jax.random.key(2), (1, length, spec.width))
    run = lambda x: encoder.encode(spec, params, x, models.default_context((1, length)), grid)  # noqa: E731
    jacobian = jax.jit(jax.jacrev(lambda x: run(x)[0].sum(-1)))(x)
    return np.abs(np.asarray(jacobian))[:, 0].sum(-1) > 0


@pytest.mark.slow
def test_without_a_grid_it_is_the_decoder(tiny):
    spec, params, tokens = made(tiny)
    context = models.default_context(tokens.shape)
    got = encoder.encode_tokens(spec, params, tokens, context)
    want, _ = decoder.hidden(spec, params, tokens, context, None)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_two_layers_let_every_token_see_every_other(tiny):
    spec, params, _ = made(tiny)
    assert influence(spec, params, (5,), 5).all()
    np.testing.assert_array_equal(influence(spec, params, (), 5), np.tril(np.ones((5, 5), bool)))


def test_attention_reads_backwards_too(tiny):
    cfg = tiny("model.depth=2", *SIZES, "model.vocab=20", "model.positions=rope")
    spec = models.spec(cfg)
    assert influence(spec, decoder.init(spec, jax.random.key(0)), (5,), 5).all()


def test_layers_that_do_nothing_leave_any_order(tiny):
    spec, params, tokens = made(tiny)
    nothing = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0 if "'out'" in jax.tree_util.keystr(path) else x, params
    )
    context = models.default_context(tokens.shape)
    plain = encoder.encode_tokens(spec, nothing, tokens, context)
    for grid in [(6,), (2, 3), (1, 2, 3)]:
        got = encoder.encode_tokens(spec, nothing, tokens, context, grid)
        np.testing.assert_array_equal(got, plain)


def test_a_packed_row_is_its_documents_alone_in_both_directions(tiny):
    spec, params, tokens = made(tiny)
    segments = jnp.array([[1, 1, 2, 2, 2, 0]] * 2)
    context = Context(jnp.array([[0, 1, 0, 1, 2, 0]] * 2), segments, -jnp.ones_like(segments))
    packed = encoder.encode_tokens(spec, params, tokens, context, (6,))
    for first, last in [(0, 2), (2, 5)]:
        own = tokens[:, first:last]
        alone = models.default_context(own.shape)
        got = encoder.encode_tokens(spec, params, own, alone, (last - first,))
        np.testing.assert_allclose(packed[:, first:last], got, atol=1e-5)


def test_a_grid_of_another_size_is_refused(tiny):
    spec, params, tokens = made(tiny)
    with pytest.raises(ConfigError, match=r"\(2, 2\) has 4 cells for 6 tokens"):
        encoder.encode_tokens(spec, params, tokens, models.default_context((2, 6)), (2, 2))


@pytest.mark.parametrize("both", [False, True])
def test_a_padded_text_has_the_vector_of_the_text(tiny, both):
    encoder_spec, params, tokens = made(tiny)
    spec = retriever.RetrieverSpec(encoder_spec, both)
    count = jnp.array([3, 6])
    got = embed(spec, params, tokens, count)
    for row, size in enumerate([3, 6]):
        alone = embed(spec, params, tokens[row : row + 1, :size], jnp.array([size]))
        np.testing.assert_allclose(got[row], alone[0], atol=1e-5)
    np.testing.assert_allclose((got**2).sum(-1), 1, rtol=1e-5)
    assert abs(float(got[0] @ got[1])) < 0.999  # two texts, two vectors


def test_loss_of_texts_with_hard_negatives(tiny):
    encoder_spec, params, tokens = made(tiny)
    spec = retriever.RetrieverSpec(encoder_spec, temperature=0.5)
    count = jnp.array([6, 6])
    q, p = (tokens[:, ::-1], count), (tokens, count)
    hard = tokens[:, None, :4], jnp.array([[4], [4]])
    got = loss_of(spec, params, q, p, hard)
    vectors = [embed(spec, params, *each) for each in (q, p)]
    third = embed(spec, params, tokens[:, :4], jnp.array([4, 4]))
    scores = vectors[0] @ jnp.concatenate([vectors[1], third]).T / 0.5
    for row, column in itertools.product(range(2), range(2)):
        if row == column:
            want = -jax.nn.log_softmax(scores[row])[column]
            assert float(got[row]) == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "counts", "message"),
    [
        ((2, 6), [0, 6], "row 0 has 0 of 6 tokens: give a count from 1 to 6"),
        ((2, 6), [6, 7], "row 1 has 7 of 6 tokens"),
        ((2, 6), [6], r"tokens \(2, 6\) with counts \(1,\)"),
        ((0, 6), [], r"tokens \(0, 6\)"),
        ((6,), [6], r"tokens \(6,\)"),
    ],
)
def test_counts_are_of_tokens_that_are_there(tiny, shape, counts, message):
    spec = retriever.RetrieverSpec(made(tiny)[0])
    with pytest.raises(ValueError, match=message):
        retriever.embed(spec, {}, jnp.zeros(shape, jnp.int32), jnp.array(counts, jnp.int32))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperatures_that_are_none_are_refused(tiny, temperature):
    with pytest.raises(ConfigError, match=f"temperature {temperature}"):
        retriever.RetrieverSpec(made(tiny)[0], temperature=temperature)
