"""Norms beside their equations, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcm import nn

EPS = 1e-3


def written_out(kind: str, x, scale, bias):
    if kind == "rms":
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + EPS) * scale
    x = x - x.mean(-1, keepdims=True)
    y = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + EPS) * scale
    return y + bias if kind == "layer" else y


@pytest.mark.parametrize("kind", nn.NORMS)
def test_values_and_gradients(kind):
    x, scale, bias = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(3, 8), 8, 8]))
    graph, state = nnx.split(nn.NORMS[kind](8, EPS))
    params = {"scale": scale, **({"bias": bias} if kind == "layer" else {})}
    assert nnx.to_pure_dict(state).keys() == params.keys()

    def ours(x, params):
        return nnx.merge(graph, params)(x)

    def theirs(x, params):
        return written_out(kind, x, params["scale"], params.get("bias"))

    loss = lambda f: lambda *args: (f(*args) ** 3).sum()  # noqa: E731
    np.testing.assert_allclose(ours(x, params), theirs(x, params), atol=1e-5)
    got, want = (jax.grad(loss(f), argnums=(0, 1))(x, params) for f in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize("kind", nn.NORMS)
def test_half_precision_is_normalised_in_single(kind):
    x = 300 * jax.random.normal(jax.random.key(0), (4, 64)).astype(jnp.float16)  # squares overflow
    y = nn.NORMS[kind](64, EPS)(x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(np.square(np.float32(y)).mean(-1), 1, atol=0.15)
