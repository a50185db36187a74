"""InfoNCE: closed forms, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm.ops.contrastive import info_nce, unit


def drawn(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_one_pair_has_nothing_to_tell_apart():
    np.testing.assert_array_equal(info_nce(drawn(1, 4), drawn(1, 4, seed=1)), [0.0])


@pytest.mark.parametrize("batch", [2, 5])
def test_identical_pairs_cost_log_b(batch):
    same = jnp.tile(drawn(1, 4), (batch, 1))
    np.testing.assert_allclose(info_nce(same, same), math.log(batch), rtol=1e-5)
    hard = jnp.tile(same[:, None], (1, 2, 1))
    np.testing.assert_allclose(info_nce(same, same, hard), math.log(3 * batch), rtol=1e-5)


def test_permuting_the_batch_permutes_rows_and_lengths_do_not_matter():
    q, p = drawn(4, 3), drawn(4, 3, seed=1)
    order = jnp.array([2, 0, 3, 1])
    loss = info_nce(q, p, temperature=0.1)
    np.testing.assert_allclose(
        info_nce(q[order], p[order], temperature=0.1), loss[order], rtol=1e-5
    )
    np.testing.assert_allclose(info_nce(q * 7, p / 3, temperature=0.1), loss, rtol=1e-4)
    cosines = np.asarray(unit(q) @ unit(p).T)
    assert np.abs(cosines).max() <= 1 + 1e-6
    want = np.log(np.exp(cosines / 0.1).sum(1)) - np.diag(cosines) / 0.1
    np.testing.assert_allclose(loss, want, rtol=1e-4)


def test_zero_vectors_have_finite_gradients():
    gradient = jax.grad(lambda q: info_nce(q, drawn(2, 3)).sum())(jnp.zeros((2, 3)))
    assert np.isfinite(gradient).all()


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="temperature 0"):
        info_nce(drawn(2, 3), drawn(2, 3), temperature=0)
    with pytest.raises(ValueError, match=r"passages \(3, 3\)"):
        info_nce(drawn(2, 3), drawn(3, 3))
    with pytest.raises(ValueError, match=r"hard negatives \(3, 1, 3\)"):
        info_nce(drawn(2, 3), drawn(2, 3), drawn(3, 1, 3))
    with pytest.raises(ValueError, match=r"hard negatives \(2, 3\): give"):
        info_nce(drawn(2, 3), drawn(2, 3), drawn(2, 3))
