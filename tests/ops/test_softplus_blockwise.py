"""LSSAR in tiles against the dense definition: loops, gradients at all powers, skipped keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import MASKS, arrays, assert_gradients_equal, packed, small_blocks

from lcm.ops.attention import (
    LinearBias,
    Part,
    SoftCap,
    Softplus,
    attend,
    causal,
    compose,
    softplus_blockwise,
    window,
)


@pytest.fixture(params=["loops", "written out"])
def blocks(request, monkeypatch):
    small_blocks(monkeypatch, looped=request.param == "loops")


def both(parts, power, *given):
    """Outputs and gradients of the dense definition and of tiles."""

    def loss(backend, *given):
        own, v, where = parts(*given)
        out = attend(own, v, where, where, normaliser=Softplus(power), backend=backend)
        weights = jnp.cos(jnp.arange(out.size).reshape(out.shape)).astype(out.dtype)
        return (out * weights).astype(jnp.float32).sum(), out

    def run(backend):
        grad = jax.grad(loss, tuple(range(1, 1 + len(given))), has_aux=True)
        return jax.jit(grad, static_argnums=0)(backend, *given)

    return run("reference"), run("blockwise")


@pytest.mark.quick("loops-2.5", "written out-15")
@pytest.mark.parametrize("power", [None, 1, 2.5, 15])
def test_every_power(blocks, power):
    def parts(q, k, v):
        return [Part(q, k)], v, packed(37)

    (expected, out), (found, tiles) = both(parts, power, *arrays(length=37, slots=37))
    np.testing.assert_allclose(tiles, out, atol=2e-5)
    assert_gradients_equal(found, expected, 5e-5)


@pytest.mark.quick("chunks")
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_in_loops(name, monkeypatch):
    small_blocks(monkeypatch, looped=True)

    def parts(q, k, v):
        return [Part(q, k, MASKS[name][0])], v, packed(37)

    (expected, out), (found, tiles) = both(parts, 15, *arrays(length=37, slots=37))
    np.testing.assert_allclose(tiles, out, atol=2e-5)
    assert_gradients_equal(found, expected, 5e-5)


def test_parts_of_one_row_with_modifications(blocks):
    """The far part sees other keys of its own; scores of a cap and slopes have gradients."""

    def parts(q, k, v, far, slopes):
        near = Part(q, k, causal() & window(5), compose(SoftCap(3.0), LinearBias(slopes)))
        return [near, Part(q, far, causal() & ~window(5))], v, packed(37)

    q, k, v = arrays(length=37, slots=37)
    given = q, k, v, k[::-1], jnp.array([0.5, 0.25, 0.1, 0.0])
    (expected, out), (found, tiles) = both(parts, 3, *given)
    np.testing.assert_allclose(tiles, out, atol=2e-5)
    assert_gradients_equal(found, expected, 5e-5)


def test_bfloat16(blocks):
    """Rounded alike before the scores; weights are rounded before or after they are divided."""

    def parts(q, k, v):
        return [Part(q, k)], v, packed(37)

    given = [x.astype(jnp.bfloat16) for x in arrays(length=37, slots=37)]
    both_ways = both(parts, 3, *given)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(both_ways))
    (expected, out), (found, tiles) = jax.tree.map(lambda x: x.astype(jnp.float32), both_ways)
    np.testing.assert_allclose(tiles, out, atol=2e-2)
    assert_gradients_equal(found, expected, 2e-2)


def test_weights_far_below_one_keep_their_ratios(blocks):
    """A bias of -60 leaves softplus(s) = exp(s) = e^-60 e^(s + 60)."""
    lowered = jax.tree_util.Partial(lambda score, q, k, head: score - 60.0)

    def parts(q, k, v):
        return [Part(q, k, causal(), lowered)], v, packed(37)

    (expected, out), (found, tiles) = both(parts, 3, *arrays(length=37, slots=37))
    np.testing.assert_allclose(tiles, out, atol=2e-5)
    assert_gradients_equal(found, expected, 5e-5)
    assert np.abs(out).max() > 0.1


def test_softplus_and_its_slope_to_six_digits():
    score = np.linspace(-80, 80, 20_001).astype(np.float32)
    exact = np.logaddexp(score.astype(np.float64), 0)
    a, slope = jax.jit(softplus_blockwise._softplus_and_slope)(score)
    np.testing.assert_allclose(a, exact, rtol=1e-6)
    np.testing.assert_allclose(slope, 1 / (1 + np.exp(-score.astype(np.float64))), rtol=1e-6)


@pytest.mark.parametrize("backward", [False, True])
def test_tiles_that_no_query_sees_are_not_computed(backward, monkeypatch):
    """Keys beyond the reach of a window may be anything."""
    small_blocks(monkeypatch, looped=True)
    q, k, v = arrays(length=64, slots=64)
    mask = causal() & window(8)

    def out(q, k, v):
        return attend([Part(q, k, mask)], v, normaliser=Softplus(), backend="blockwise")[:, 48:]

    def run(k, v):
        if backward:
            return jax.jit(jax.grad(lambda q: out(q, k, v).sum()))(q)[:, 48:]
        return jax.jit(out)(q, k, v)

    spoiled = (x.at[:, :24].set(jnp.nan) for x in (k, v))
    np.testing.assert_array_equal(run(*spoiled), run(k, v))
