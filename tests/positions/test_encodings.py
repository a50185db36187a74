"""Encodings against hand-computed values, published tables and transformers-free oracles."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DIMS, arrays, context

from lcm import models, positions
from lcm.errors import ConfigError
from lcm.nn.block import MIXERS
from lcm.ops.attention import Part
from lcm.positions import alibi
from lcm.positions.absolute import countdown_scale, sinusoid
from lcm.positions.base import PositionEncoding
from lcm.positions.registry import ENCODINGS
from lcm.types import Context


def at(numbers) -> Context:
    numbers = jnp.asarray(numbers, jnp.int32)[None]
    return Context(numbers, jnp.ones_like(numbers), numbers)


def test_alibi_slopes_of_the_card():
    assert alibi.slopes(8) == [2.0**-h for h in range(1, 9)]
    extra = [0.707107, 0.353553, 0.176777, 0.088388]
    np.testing.assert_allclose(alibi.slopes(12), alibi.slopes(8) + extra, atol=1e-6)
    np.testing.assert_allclose(alibi.slopes(9), [*alibi.slopes(8), 0.70711], atol=1e-5)
    assert alibi.slopes(1) == [2.0**-8]


def test_rope_scores_depend_on_distance_alone():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 16)) for i in (0, 1))
    rope = positions.RoPE()

    def score(i, j):
        return float((rope.rotate(q, at([i])[0]) * rope.rotate(k, at([j])[0])).sum())

    for distance in (0, 1, 7, 100):
        values = [score(start + distance, start) for start in (0, 3, 1000)]
        np.testing.assert_allclose(values, values[0], rtol=1e-4, atol=1e-4)


def test_rope_equals_complex_rotation():
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, 5, 2, 8)))
    theta = 500.0 ** (-np.arange(4) * 2 / 8)
    turn = np.exp(1j * np.arange(5)[:, None] * theta)[None, :, None]
    want = (x[..., :4] + 1j * x[..., 4:]) * turn
    got = positions.RoPE(base=500.0).rotate(jnp.asarray(x), at(range(5))[0])
    np.testing.assert_allclose(got, np.concatenate([want.real, want.imag], -1), atol=1e-5)


def test_rope_angles_stay_exact_in_bf16():
    """At position 100,000 bfloat16 angles would be off by hundreds of radians."""
    x = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    got = positions.RoPE().rotate(x, at([100_000])[0])
    want = positions.RoPE().rotate(x.astype(jnp.float32), at([100_000])[0])
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=1e-2)


def test_angles_of_a_million_positions_are_those_of_float64():
    """In one float32 product they would be off by 0.03."""
    where = np.asarray([4095, 4096, 99_999, 1_000_003, 10_000_019])
    x = jnp.ones((1, len(where), 1, 64))
    theta = 10_000.0 ** (-np.arange(32) / 32)
    turn = (1 + 1j) * np.exp(1j * np.fmod(where[:, None] * theta, 2 * np.pi))
    got = positions.RoPE().rotate(x, at(where)[0])[0, :, 0]
    np.testing.assert_allclose(got, np.concatenate([turn.real, turn.imag], -1), atol=2e-3)


def test_sinusoid_norms_and_zero():
    table = sinusoid(jnp.arange(300)[None], 64, 10_000.0)[0]
    np.testing.assert_allclose(np.linalg.norm(table, axis=-1), 32**0.5, rtol=1e-5)
    np.testing.assert_array_equal(table[0], np.tile([0.0, 1.0], 32))
    np.testing.assert_allclose(
        table[5, 2:4], [np.sin(5 / 1e4 ** (2 / 64)), np.cos(5 / 1e4 ** (2 / 64))], rtol=1e-5
    )


def test_countdown_ldpe_and_orpe_agree_on_the_response():
    """The card: bit-identical on response positions, s*PE(n) apart on the prompt."""
    encoding, dims = positions.Countdown(), positions.Dims(32, 2, 2, 16, 32)
    params = encoding.init(jax.random.key(0), dims)
    x = jax.random.normal(jax.random.key(1), (1, 12, 32))
    ldpe = at(range(12))._replace(remaining_BL=jnp.arange(11, -1, -1)[None])
    orpe = ldpe._replace(remaining_BL=ldpe.remaining_BL.at[:, :5].set(-1))
    with_prompt, without = encoding.embed(params, x, ldpe), encoding.embed(params, x, orpe)
    np.testing.assert_array_equal(with_prompt[:, 5:], without[:, 5:])
    np.testing.assert_array_equal(without[:, :5], x[:, :5])
    difference = (with_prompt - x)[:, :5]
    scale = (1 / 32) ** 0.5 / 16**0.5 * 32**0.5  # fresh rows have norm 1, sinusoids sqrt(D/2)
    signal = scale / 32**0.5 * 32**0.5 * sinusoid(ldpe.remaining_BL[:, :5], 32, 1e4)
    np.testing.assert_allclose(difference, signal, atol=1e-6)


def test_countdown_without_control_is_bit_identical(tiny):
    row = jnp.arange(16)[None]
    plain, counted = tiny(), tiny("model.positions=countdown+rope")
    params = models.init(counted, jax.random.key(0))
    bare = {k: v for k, v in params.items() if k != "positions"}
    np.testing.assert_array_equal(
        models.apply(counted, params, row)[0], models.apply(plain, bare, row)[0]
    )


def test_countdown_scale_is_the_ratio_of_norms():
    table = jax.random.normal(jax.random.key(0), (320, 64)) * 0.05
    rows = np.linalg.norm(table) / np.sqrt(320)
    assert float(countdown_scale(table)) == pytest.approx(rows / np.sqrt(32), rel=1e-5)


def test_countdown_scale_gets_no_gradient(tiny):
    cfg = tiny("model.positions=countdown+rope")
    params, spec = models.init(cfg, jax.random.key(0)), models.spec(cfg)
    context = at(range(8))
    loss = lambda p: models.decoder.apply(spec, p, jnp.arange(8)[None], context, None)[0].var()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(params)
    assert float(gradient["positions"]["model"]["first"]["scale"]) == 0


def test_nope_ignores_positions_and_alibi_does_not(tiny):
    row = jnp.arange(12)[None]
    spaced = models.default_context((1, 12))._replace(positions_BL=jnp.arange(0, 36, 3)[None])
    for name, moves in (("nope", False), ("alibi", True), ("rope", True), ("sinusoidal", True)):
        cfg = tiny(f"model.positions={name}")
        params = models.init(cfg, jax.random.key(0))
        change = np.abs(
            models.apply(cfg, params, row)[0] - models.apply(cfg, params, row, spaced)[0]
        )
        assert (change.max() > 1e-3) == moves, name


@pytest.mark.parametrize("name", [n for n in ENCODINGS if n != "chain"])
def test_config_entries_round_trip(name):
    encoding = ENCODINGS[name]()
    assert positions.make(positions.config(encoding)) == encoding
    assert positions.make(positions.config(name)) == encoding
    chained = positions.Chain(positions.Countdown(base=77.0), encoding)
    assert positions.make(positions.config(chained)) == chained


def test_unknown_names_and_fields_list_the_known_ones():
    with pytest.raises(ConfigError, match="'rpoe' is unknown: choose from nope, learned"):
        positions.make({"name": "rpoe"})
    with pytest.raises(ConfigError, match="factor is not a field of rope: it has base"):
        positions.config("rope", factor=2.0)


@dataclasses.dataclass(frozen=True)
class Temperature(PositionEncoding):
    """A learned factor on the queries of each head and layer: an encoding made of a test alone."""

    cache: ClassVar = "raw"

    def init(self, key, dims):
        return {"bias": jnp.zeros(dims.heads)}

    def init_layer(self, key, dims):
        return {"factor": jnp.ones(dims.heads)}

    def parts(self, params, q_BLHK, k_BSGK, q_context, k_context):
        assert set(params) == {"bias", "factor"}
        return (Part(q_BLHK * params["factor"][:, None], k_BSGK),)


def test_a_new_encoding_is_one_class_and_one_line(tiny, monkeypatch):
    """Its parameters, shared and per layer, reach it and get gradients; nothing else changes."""
    monkeypatch.setitem(ENCODINGS, "temperature", Temperature)
    cfg = tiny("model.positions=temperature", "model.depth=3")
    params, spec = models.init(cfg, jax.random.key(0)), models.spec(cfg)
    assert params["layers"]["0"]["mixer"]["positions"]["factor"].shape == (3, 2)
    assert params["positions"]["model"]["bias"].shape == (2,)
    row, context = jnp.arange(12)[None], at(range(12))
    loss = lambda p: models.decoder.apply(spec, p, row, context, None)[0].var()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(params)["layers"]["0"]["mixer"]["positions"]["factor"]
    assert np.all(np.abs(gradient) > 0)
    bare = jax.tree.map(lambda x: x, params)
    del bare["layers"]["0"]["mixer"]["positions"], bare["positions"]
    plain, _ = models.apply(tiny("model.positions=nope", "model.depth=3"), bare, row)
    np.testing.assert_allclose(models.apply(cfg, params, row)[0], plain, atol=1e-6)
    assert MIXERS["attention"] is not None


def test_a_chain_inside_of_a_chain_keeps_what_each_learns():
    """Parameters of both have a place, trained ones are found by a chain that has grown."""
    inner = positions.Chain(positions.HeadScale(), positions.Kerple())
    outer = positions.Chain(positions.HeadScale(factor=3.0), inner)
    key = jax.random.key(0)
    trained = {**inner.init_layer(key, DIMS), "first": {"head_scale": jnp.full(DIMS.heads, 2.0)}}
    fresh = outer.init_layer(key, DIMS)
    q, k, _ = arrays()
    (part,) = outer.parts(fresh, q, k, context(), context())
    np.testing.assert_allclose(part.q_BLHK, 3.0 * q, rtol=1e-6)
    aligned = positions.Chain(positions.Aligned(), inner)
    adopted = aligned.adopt(aligned.init_layer(key, DIMS), trained)
    (part,) = aligned.parts(
        {**adopted, "first": {"temperature": jnp.asarray(0.5)}}, q, k, context(), context()
    )
    np.testing.assert_allclose(part.q_BLHK, 2.0 * q, rtol=1e-6)
