"""The kernel of the recurrence of a vector, run as plain JAX, against one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm.ops.recurrence import op_diag
from lcm.ops.recurrence.reference import diag_steps

pytestmark = pytest.mark.usefixtures("interpreted")


def case(shape, dtype=jnp.float32):
    """`a`, `b` and `h0`, and resets of a tenth of all tokens."""
    random = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(random.normal(size=s), jnp.float32)  # noqa: E731
    a, b, h0 = jax.nn.sigmoid(draw(*shape)), draw(*shape), draw(shape[0], *shape[2:])
    return a.astype(dtype), b.astype(dtype), h0, jnp.asarray(random.random(shape[:2]) < 0.1)


def both(function, a, b, h0, reset):
    """States and the last one, and gradients of all that has some."""

    def loss(a, b, h0):
        h, last = function(a, b, h0, reset)
        return jnp.sin(h).sum() + jnp.cos(last).sum(), (h, last)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(a, b, h0)


def by_token(a, b, h0, reset):
    return diag_steps(a.astype(jnp.float32), b.astype(jnp.float32), h0, reset)


@pytest.mark.quick("shape0-*", "shape3-*", "shape6-*")
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((2, 37, 130), jnp.float32),  # neither whole registers nor lanes
        ((1, 290, 24), jnp.float32),  # two tiles, the second one short
        ((1, 32, 1100), jnp.float32),  # two blocks of channels
        ((2, 40, 3, 5), jnp.float32),
        ((1, 40, 5, 3), jnp.float32),
        ((1, 2), jnp.float32),
        ((1, 50, 40), jnp.bfloat16),
    ],
)
def test_is_token_by_token(shape, dtype):
    got, want = (both(run, *case(shape, dtype)) for run in (op_diag, by_token))
    (_, (h, last)), gradients = got
    assert h.dtype == last.dtype == jnp.float32
    assert [x.dtype for x in gradients] == [dtype, dtype, jnp.float32]
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        rtol = 1e-5 if x.dtype == jnp.float32 else 1e-2
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        np.testing.assert_allclose(x, y, atol=rtol * float(jnp.abs(y).max()))


def test_what_has_a_kernel():
    """Real numbers, where no chunk is asked for, and more tokens than one."""
    a, b, h0, reset = case((1, 40, 8))
    calls = lambda *given, **how: str(jax.make_jaxpr(lambda *x: op_diag(*x, **how))(*given)).count(  # noqa: E731
        "pallas_call"
    )
    assert calls(a, b, h0, reset) == 1
    assert calls(a, b) == 1
    assert calls(a.astype(jnp.complex64), b) == 0
    assert calls(a, b, chunk=8) == 0
    assert calls(a[:, :1], b[:, :1]) == 0
