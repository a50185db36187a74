"""How matrices are multiplied on a TPU, which need not be here, and where they lie before it."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.aot.test_program import needs_libtpu

dense = importlib.import_module("lcm.nn.dense")  # lcm.nn has a function of that name


@pytest.fixture
def factors():
    draw = np.random.default_rng(0)
    return tuple(jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((2, 3, 8), (8, 5)))


def test_axes_that_are_not_merged_change_nothing(factors, monkeypatch):
    run = lambda: jax.value_and_grad(lambda x, w: (dense.dense(x, w) ** 2).sum(), (0, 1))(*factors)  # noqa: E731
    want = run()
    text = lambda: str(jax.make_jaxpr(lambda x, w: dense.dense(x, w))(*factors))  # noqa: E731
    assert "reshape" in text()
    monkeypatch.setattr(dense, "platform", lambda: "tpu")
    assert "reshape" not in text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), run(), want)


def test_heads_are_cut_out_of_the_matrix_or_of_the_result(monkeypatch):
    draw = np.random.default_rng(1)
    shapes = (2, 3, 8), (8, 12), (12, 8)
    given = tuple(jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes)

    def run():
        def loss(x, w_in, w_out):
            return (dense.from_heads(dense.to_heads(x, w_in, 4), w_out) ** 2).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(*given)

    want = run()
    monkeypatch.setattr(dense, "platform", lambda: "tpu")
    assert dense.to_heads(*given[:2], 4).shape == (2, 3, 3, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), run(), want)


@needs_libtpu
def test_a_matrix_is_gathered_in_the_narrower_dtype_but_along_tensor():
    from lcm import aot

    mesh = aot.mesh("v5e:2x2", (2, 2), ("fsdp", "tensor"))
    x = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((8, 6), jnp.float32)
    with jax.set_mesh(mesh):
        (cast, placed) = jax.make_jaxpr(lambda w: dense.whole(w, x, "width", "heads"))(w).eqns
    assert cast.outvars[0].aval.dtype == jnp.bfloat16
    assert placed.params["sharding"].spec == jax.sharding.PartitionSpec(None, "tensor")


def test_without_a_mesh_a_matrix_is_as_it_was(factors):
    x, w = factors
    assert dense.whole(w, x, "width", "heads") is w
    quantised = dense.Int8(jnp.zeros((8, 5), jnp.int8), jnp.ones(5))
    assert dense.whole(quantised, x, "width", "heads") is quantised
