"""The transducer's lattice against enumeration, published values and closed forms."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm.ops.transducer import lattice, log_alphas, log_betas, occupancy, transducer_loss


def drawn(frames, labels, seed=0, batch=1, vocabulary=5):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(batch, frames, labels + 1, vocabulary)).astype(np.float32) * 2
    return jnp.asarray(logits), jnp.asarray(rng.integers(1, vocabulary, (batch, labels)))


loss_of = jax.jit(transducer_loss)
alphas, betas, passes = jax.jit(log_alphas), jax.jit(log_betas), jax.jit(occupancy)
gradient_of = jax.jit(jax.value_and_grad(lambda *of: transducer_loss(*of).sum()))


def whole(batch, frames, labels):
    return jnp.full(batch, frames), jnp.full(batch, labels)


def enumerated(logits_TUV, labels_U):
    """The sum over alignments, each an order of T blanks, the last at the end, and U labels."""
    log_p = np.asarray(jax.nn.log_softmax(logits_TUV), np.float64)
    frames, labels = log_p.shape[0], len(labels_U)
    total = 0.0
    for places in itertools.combinations(range(frames - 1 + labels), labels):
        t = u = 0
        score = 0.0
        for step in range(frames - 1 + labels):
            if step in places:
                score += log_p[t, u, labels_U[u]]
                u += 1
            else:
                score += log_p[t, u, 0]
                t += 1
        total += math.exp(score + log_p[t, u, 0])
    return -math.log(total)


def test_loss_is_the_sum_over_alignments():
    """Of every size up to four frames and four labels, in one padded batch."""
    sizes = list(itertools.product(range(1, 5), range(5)))
    logits, labels = drawn(4, 4, batch=len(sizes))
    got = loss_of(logits, labels, *map(jnp.array, zip(*sizes, strict=True)))
    for row, (t, u) in enumerate(sizes):
        want = enumerated(logits[row, :t, : u + 1], np.asarray(labels[row, :u]))
        assert float(got[row]) == pytest.approx(want, rel=1e-5)


def test_value_and_gradient_of_warp_transducer():
    """Its `test.py` (HawkAaron/warp-transducer)."""
    logits = np.array(
        [
            [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.6, 0.1, 0.1], [0.1, 0.1, 0.2, 0.8, 0.1]],
            [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.1, 0.1], [0.7, 0.1, 0.2, 0.1, 0.1]],
        ],
        np.float32,
    )
    labels, sizes = jnp.array([[1, 2]]), whole(1, 2, 2)
    value, gradient = gradient_of(jnp.asarray(logits)[None], labels, *sizes)
    assert float(value) == pytest.approx(4.495666, abs=1e-5)
    first = [-0.131167, -0.399927, 0.177031, 0.177031, 0.177031]
    np.testing.assert_allclose(gradient[0, 0, 0], first, atol=1e-5)


@pytest.mark.parametrize(("frames", "labels"), [(1, 0), (3, 0), (4, 3), (9, 6)])
def test_equal_logits_count_alignments(frames, labels):
    logits = jnp.zeros((1, frames, labels + 1, 5))
    got = loss_of(logits, jnp.ones((1, labels), int), *whole(1, frames, labels))
    ways = math.comb(frames + labels - 1, labels)
    want = (frames + labels) * math.log(5) - math.log(ways)
    assert float(got[0]) == pytest.approx(want, rel=1e-5)


def test_every_antidiagonal_holds_the_likelihood():
    logits, labels = drawn(6, 4)
    sizes = whole(1, 6, 4)
    blank, emit = lattice(logits, labels, sizes[1])
    both = np.asarray(alphas(blank, emit) + betas(blank, emit, *sizes))[0]
    want = -float(loss_of(logits, labels, *sizes)[0])
    for n in range(6 + 4):
        cells = [both[t, n - t] for t in range(6) if 0 <= n - t <= 4]
        assert np.logaddexp.reduce(cells) == pytest.approx(want, rel=1e-5)
    # A path stays a frame for each blank: T + U nodes of it, the end included.
    assert float(passes(blank, emit, *sizes).sum()) == pytest.approx(6 + 4, rel=1e-5)


def test_gradient_is_the_published_formula():
    """`exp(alpha + beta - log P) p` less what goes along the edge, for every logit."""
    logits, labels = drawn(4, 3, seed=3)
    sizes = whole(1, 4, 3)
    value, gradient = gradient_of(logits, labels, *sizes)
    total, gradient = -float(value), gradient[0]
    blank, emit = lattice(logits, labels, sizes[1])
    alpha, beta = alphas(blank, emit)[0], betas(blank, emit, *sizes)[0]
    log_p = jax.nn.log_softmax(logits[0])
    want = np.exp(alpha + beta - total)
    want = want[..., None] * np.exp(log_p)
    for t, u in itertools.product(range(4), range(4)):
        after = beta[t + 1, u] if t < 3 else (0.0 if u == 3 else -np.inf)
        want[t, u, 0] -= np.exp(alpha[t, u] + log_p[t, u, 0] + after - total)
        if u < 3:
            k = int(labels[0, u])
            want[t, u, k] -= np.exp(alpha[t, u] + log_p[t, u, k] + beta[t, u + 1] - total)
    np.testing.assert_allclose(gradient, want, atol=2e-6)


def test_padded_rows_are_rows_alone_with_finite_gradients():
    logits, labels = drawn(7, 5, seed=2, batch=3)
    frames, counts = [7, 4, 1], [3, 5, 0]
    got, gradient = gradient_of(logits, labels, jnp.array(frames), jnp.array(counts))
    total = 0.0
    for row, (t, u) in enumerate(zip(frames, counts, strict=True)):
        alone, wanted = logits[row : row + 1, :t, : u + 1], labels[row : row + 1, :u]
        value, own = gradient_of(alone, wanted, *whole(1, t, u))
        total += float(value)
        np.testing.assert_allclose(gradient[row, :t, : u + 1], own[0], atol=1e-6)
        rest = np.asarray(gradient[row]).copy()
        rest[:t, : u + 1] = 0
        assert (rest == 0).all()
    assert float(got) == pytest.approx(total, rel=1e-6)
    assert np.isfinite(gradient).all()


def test_long_and_certain_lattices_stay_finite():
    """Where `exp` of a difference of prefix sums would overflow float32."""
    logits, labels = drawn(50, 40, seed=4)
    logits = logits * 100
    sizes = whole(1, 50, 40)
    value, gradient = gradient_of(logits, labels, *sizes)
    log_p = np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)), np.float64)
    alpha = np.full((50, 41), -np.inf)
    alpha[0, 0] = 0
    for t, u in itertools.product(range(50), range(41)):
        if t:
            alpha[t, u] = np.logaddexp(alpha[t, u], alpha[t - 1, u] + log_p[t - 1, u, 0])
        if u:
            step = alpha[t, u - 1] + log_p[t, u - 1, int(labels[0, u - 1])]
            alpha[t, u] = np.logaddexp(alpha[t, u], step)
    assert float(value) == pytest.approx(-(alpha[-1, -1] + log_p[-1, -1, 0]), rel=1e-4)
    assert np.isfinite(gradient).all()


def test_shapes_that_do_not_go_together_are_refused():
    logits, labels = drawn(2, 3)
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 5\) for labels \(1, 2\).*U \+ 1"):
        transducer_loss(logits, labels[:, :2], *whole(1, 2, 2))
