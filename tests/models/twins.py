"""One layer with random parameters, for twins of it in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from lcm import models
from lcm.nn import MIXERS
from lcm.nn.functional import functional

LENGTH, WIDTH, HEADS, N = 13, 16, 2, 8
P = 2 * WIDTH // HEADS


def mixer(tiny, name, *keys):
    """A layer's description, its random parameters in float64, and its function of `[L, D]`."""
    cfg = tiny(
        f"model.mixer={name}",
        f"model.pattern={name}",
        f"model.width={WIDTH}",
        f"model.heads={HEADS}",
        f"model.state={N}",
        "model.depth=1",
        "model.recurrence_chunk=4",
        *keys,
    )
    layer = models.spec(cfg).layers[0]
    params = models.decoder.block(layer).init(jax.random.key(0))["mixer"]
    draw = np.random.default_rng(0)
    noisy = lambda x: x + 0.3 * draw.standard_normal(x.shape)  # noqa: E731 zeros and ones hide
    params = jax.tree.map(noisy, jax.tree.map(np.asarray, params))

    def run(u_LD, shared=None):
        apply = jax.jit(functional(lambda rngs: MIXERS[name](layer, rngs)).apply)
        single = jax.tree.map(jnp.float32, params)
        context = models.default_context((1, len(u_LD)))
        return np.asarray(apply(single, jnp.float32(u_LD)[None], context, None, shared or {})[0][0])

    return layer, params, run


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, x)
