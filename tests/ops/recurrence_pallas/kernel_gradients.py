"""Kernels of matrices beside their twin: outputs, states, and the gradients of everything."""

import jax
import jax.numpy as jnp
import numpy as np


def both(function, given, reset):
    """Outputs and the last state, and the gradients of all that is given."""

    def loss(given):
        y, S = function(*given, reset)
        waves = (jnp.sin(jnp.arange(x.size) % 7.0).reshape(x.shape) for x in (y, S))
        return sum((w * x).sum() for w, x in zip(waves, (y, S), strict=True)), (y, S)

    (_, found), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(given)
    return found, gradients


def close(got, want, share):
    """Within a share of the largest number of each array."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        np.testing.assert_allclose(x, y, atol=share * float(jnp.abs(y).max()))


def rounds_what_is_narrow(in_kernels, by_token, given, reset):
    """Of bfloat16 the state is exact, and what tokens of a chunk add to outputs is rounded."""
    (y, S), gradients = both(in_kernels, given, reset)
    (want_y, want_S), wanted = both(by_token, given, reset)
    assert y.dtype == jnp.bfloat16 and S.dtype == jnp.float32
    assert [x.dtype for x in gradients] == [x.dtype for x in given]
    close(S, want_S, 1e-5)
    close((y, *gradients), (want_y, *wanted), 1e-2)
