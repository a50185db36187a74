"""Narrow weights: products within the bound that rounding sets, logits within what was measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm.decoding import Engine, programs
from lcm.errors import UserError
from lcm.models import decoder
from lcm.nn.dense import Int8, product, product_with_rows
from lcm.ops.int8 import quantised

from . import tiny


def numbers(*shape: int) -> np.ndarray:
    """With outliers, as activations have them."""
    random = np.random.default_rng(sum(shape))
    return (random.standard_normal(shape) * random.gamma(0.5, 2, shape)).astype(np.float32)


def int8(w: np.ndarray, axis: int) -> Int8:
    q, scale = quantised(jnp.asarray(w), axis)
    return Int8(q, scale.reshape(-1))


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("axis", [0, 1])
def test_int8_products_are_within_their_rounding(rows, axis):
    """|x w - x' w'| <= |x'| e_w + e_x |w|, e_w half a scale of a column, e_x that over 254."""
    x, w = numbers(rows, 96), numbers(96, 40)
    x[0, :5] = 0
    w[:, 3] = 0
    table = int8(w if axis == 0 else w.T.copy(), axis)
    got = (product if axis == 0 else product_with_rows)(jnp.asarray(x), table, jnp.float32)
    assert got.dtype == jnp.float32
    exact = x.astype(np.float64) @ w
    e_w = np.abs(w).max(0, keepdims=True) / 254
    e_x = np.abs(x).max(1, keepdims=True) / 254 / 254
    bound = (np.abs(x) + e_x).sum(1, keepdims=True) * e_w + e_x * np.abs(w).sum(0)
    error = np.abs(np.asarray(got) - exact)
    assert (error <= bound * (1 + 1e-5) + 1e-6).all() and error.max() > 0
    assert not np.asarray(got)[:, 3].any()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("axis", [0, 1])
def test_bfloat16_products_are_within_their_rounding(rows, axis):
    """Both factors are rounded by 2^-9 of themselves, sums are float32."""
    x, w = numbers(rows, 96), numbers(96, 40)
    narrow = jnp.asarray(w if axis == 0 else w.T.copy(), jnp.bfloat16)
    got = (product if axis == 0 else product_with_rows)(jnp.asarray(x), narrow, jnp.float32)
    assert got.dtype == jnp.float32
    bound = (np.abs(x).astype(np.float64) @ np.abs(w)) * (2 * 2**-8)
    error = np.abs(np.asarray(got) - x.astype(np.float64) @ w)
    assert (error <= bound).all() and error.max() > 0


def test_rows_of_an_int8_table():
    w = numbers(30, 16)
    table = int8(w, 1)
    rows = table[jnp.asarray([[3, 4], [0, 29]])]
    wanted = w[np.array([[3, 4], [0, 29]])]
    assert (np.abs(rows - wanted) <= np.abs(wanted).max(-1, keepdims=True) / 254 * 1.001).all()
    assert table[...] is table and table.shape == (30, 16)


# Measured on the model here, whose logits have a standard deviation of 1: 0.039 and 0.095.
BOUNDS = {"bfloat16": 0.06, "int8": 0.12}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", BOUNDS)
def test_logits_are_near(weights, tied):
    model = tiny.model(f"model.tied={tied}")
    token, active = jnp.asarray([3, 7]), jnp.ones(2, bool)

    def logits(weights: str):
        machine = Engine(model, weights=weights)
        state = machine.state(2, 64)
        for step in range(5):
            arguments = machine.spec, machine.params, state, token + step, active
            state, found = programs.logits(*arguments)
        return np.asarray(found), machine.params

    (want, _), (got, params) = logits(""), logits(weights)
    error = np.abs(got - want).max()
    print(f"{weights} tied={tied}: {error:.4f} of std {want.std():.2f}")
    assert 0 < error < BOUNDS[weights] * want.std()
    kinds = {True: Int8, False: jax.Array}
    matrices = [params["embedding"]["table"], params["layers"]["0"][0]["mixer"]["q"]]
    matrices += [] if tied else [params["head"]["kernel"]]
    for matrix in matrices:
        assert isinstance(matrix, kinds[weights == "int8"])
        assert weights == "int8" or matrix.dtype == jnp.bfloat16
    assert params["final_norm"]["scale"].dtype == jnp.float32


@pytest.mark.quick("fire")
@pytest.mark.parametrize("encoding", ["cope", "fire", "t5", "learned"])
def test_what_encodings_learn_stays_as_it_is(encoding):
    fields = ["model.positions.shared=False"] if encoding == "fire" else []
    model = tiny.model(f"model.positions={encoding}", *fields)
    machine = Engine(model, weights="int8", rows=1)
    (events,) = tiny.run(machine, [tiny.request(4, 2)])
    assert np.isfinite([event.raw_logprob for event in events]).all()
    own = decoder.unstacked(model.params["layers"]["0"])[0]["mixer"].get("positions", {})
    kept = machine.params["layers"]["0"][0]["mixer"].get("positions", {})
    jax.tree.map(np.testing.assert_array_equal, own, kept)


def test_an_unknown_name():
    with pytest.raises(UserError, match="weights='fp8' is unknown: choose from"):
        Engine(tiny.model(), weights="fp8")
