"""Functions whose backward pass starts from their arguments."""

import jax
import jax.numpy as jnp
import numpy as np

from lcm.ops.recompute import after, recomputed


def test_value_and_gradient_are_the_functions_own():
    function = lambda x, w: jnp.tanh(x @ w) * x  # noqa: E731
    x, w = jax.random.normal(jax.random.key(0), (2, 8, 8))
    expected = jax.vjp(function, x, w)
    found = jax.vjp(recomputed(function), x, w)
    np.testing.assert_array_equal(found[0], expected[0])
    for a, b in zip(found[1](x), expected[1](x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_layers_do_not_hold_what_they_compute_again():
    """Eight layers whose inside is 16 times as wide as what they keep: one inside at a time."""

    def temporary(wrap):
        inside = lambda x, w: jnp.sin(jnp.cos(jnp.exp(x[:, :, None]) * w)).sum(-1)  # noqa: E731
        layer = wrap(inside)

        def loss(x, w):
            for _ in range(8):
                x = jnp.tanh(layer(x, w))
            return x.sum()

        shapes = (
            jax.ShapeDtypeStruct((256, 256), jnp.float32),
            jax.ShapeDtypeStruct((16,), jnp.float32),
        )
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    wide = 256 * 256 * 16 * 4
    assert temporary(recomputed) < 4 * wide
    assert temporary(lambda f: f) > 8 * wide


def test_after_changes_nothing_but_passes_nan_on():
    x = jnp.array([1.0, -2.0])
    np.testing.assert_array_equal(after(x, jnp.array([jnp.inf])), x)
    if jax.default_backend() == "cpu":
        assert np.isnan(after(x, jnp.array([jnp.nan, 0.0]))).all()
