"""Kernels run as plain JAX, against the reference backend; tiles of 128 at lengths above."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slope_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.scipy.special import logsumexp
from kernel_cases import arrays, both, close, rows, run, sums_of_terms

from lcm.ops.attention import (
    LinearBias,
    Mask,
    Part,
    SoftCap,
    blockwise,
    causal,
    chunks,
    compose,
    pallas,
    prefix,
    reference,
    sinks,
    window,
)
from lcm.ops.attention.pallas import tiles
from lcm.ops.attention.pallas.walk import Runs, Step
from lcm.types import Context

pytestmark = pytest.mark.usefixtures("interpreted")

MASKS = {
    "all": Mask(),
    "causal": causal(),
    "window": causal() & window(140),
    "sinks": causal() & sinks(3),
    "beyond": causal() & ~window(140),
    "prefix": prefix(150),
    "chunks": causal() & chunks(90),
}
MODS = {
    "none": lambda slopes: None,
    "bias": LinearBias,
    "capped bias": lambda slopes: compose(SoftCap(1.5), LinearBias(slopes)),
}


@pytest.mark.quick("causal", "chunks")
@pytest.mark.parametrize("name", MASKS)
def test_masks_on_packed_rows(name):
    where = rows((150, 80, 40), (290,), total=300)
    make = lambda q, k, v: ([Part(q, k, MASKS[name])], v)  # noqa: E731
    close(*both(make, arrays(300, 300), where, where))


@pytest.mark.parametrize("size, values", [(24, 16), pytest.param(8, 40, marks=pytest.mark.slow)])
def test_values_of_another_size_than_keys(size, values):
    where = rows((150, 80, 40), (290,), total=300)
    (q, k, _), (_, _, v) = arrays(300, 300, size=size), arrays(300, 300, size=values)
    found, expected = both(lambda q, k, v: ([Part(q, k)], v), (q, k, v), where, where)
    assert found[0].shape[-1] == values
    close(found, expected)


@pytest.mark.quick("2-1-144*")
@pytest.mark.parametrize(
    "heads, kv_heads, size, mod, dtype",
    [
        (4, 2, 24, "capped bias", jnp.float32),
        (3, 3, 33, "bias", jnp.float32),
        (2, 1, 144, "bias", jnp.bfloat16),
    ],
)
def test_two_parts_with_modifications(heads, kv_heads, size, mod, dtype):
    where = rows((150, 80, 40), (290,), total=300)
    q, k, v = arrays(300, 300, heads, kv_heads, size, dtype)
    q2, k2, _ = arrays(300, 300, heads, kv_heads, size, dtype, seed=1)
    slopes = jnp.linspace(0.5, 0.0, heads)

    def make(q, k, q2, k2, v, slopes):
        near = Part(q, k, causal() & window(70), MODS[mod](slopes))
        return [near, Part(q2, k2, causal() & ~window(70))], v

    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    close(*both(make, (q, k, q2, k2, v, slopes), where, where), tolerance)


def test_gradient_by_some_keys_where_the_result_over_all_is_known():
    """As over shards of keys: gradients of each, given the whole, are those of the whole."""
    where = rows((150, 80, 40), (290,), total=300)
    q, k, v = arrays(300, 300)
    d = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    def attended(known, at, q, k, v):
        keys = jax.tree.map(lambda x, at=at: x[:, at], where)
        part = Part(q, k, causal() & window(140), SoftCap(1.5))
        return pallas.attend((part,), v, where, keys, 0.3, known)

    @jax.jit
    def gradients(q, k, v):
        everything = slice(None)
        result, pull = jax.vjp(functools.partial(attended, None, everything), q, k, v)
        d_result = result._replace(out_BLHK=d, lse_BLH=d[..., 0])
        found = []
        for at in (slice(0, 130), slice(130, 300)):
            of_some = functools.partial(attended, result, at)
            found.append(jax.vjp(of_some, q, k[:, at], v[:, at])[1](d_result))
        (q1, k1, v1), (q2, k2, v2) = found
        joined = q1 + q2, jnp.concatenate([k1, k2], 1), jnp.concatenate([v1, v2], 1)
        return joined, pull(d_result)

    got, want = gradients(q, k, v)
    for a, b in zip(got, want, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("length, slots", [(1, 260), (130, 260), (260, 40)])
def test_other_keys_than_queries(length, slots):
    """Positions of keys in any order and empty slots: nothing may be skipped by index."""
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(slots) for _ in range(2)]).astype(np.int32)
    k_where = Context(order, (order < slots - 5).astype(np.int32), order)
    q_pos = np.broadcast_to(np.arange(length, dtype=np.int32) + slots // 2, (2, length))
    q_where = Context(q_pos, np.ones_like(q_pos), q_pos)
    make = lambda q, k, v: ([Part(q, k, causal() & window(50))], v)  # noqa: E731
    close(*both(make, arrays(length, slots), q_where, k_where))


def test_log_sum_exp_and_its_gradient():
    where = rows((150, 80, 40), (290,), total=300)
    q, k, v = arrays(300, 300)
    weights = jnp.sin(jnp.arange(1200.0)).reshape(2, 300, 2)
    real = jnp.asarray(where.segments_BL > 0)[..., None]

    def dense(q, k):
        scores = jnp.einsum("blhk,bsgk->blhs", q * 0.3, k)
        seen = (where.segments_BL[:, :, None] == where.segments_BL[:, None]) & (
            where.positions_BL[:, :, None] >= where.positions_BL[:, None]
        )
        return logsumexp(jnp.where(seen[:, :, None], scores, -jnp.inf), axis=-1)

    kernel = lambda q, k: run(pallas, [Part(q, k)], v, where, where)[1]  # noqa: E731

    def loss(lse, q, k):
        return (jnp.where(real, lse(q, k), 0.0) * weights).sum()

    lse = jax.jit(kernel)(q, k)
    assert (np.asarray(lse)[where.segments_BL == 0] == -np.inf).all()
    close([jnp.where(real, lse, 0)], [jnp.where(real, dense(q, k), 0)])
    grads = [jax.jit(jax.grad(loss, (1, 2)), static_argnums=0)(f, q, k) for f in (kernel, dense)]
    close(*grads)


def test_rows_that_see_nothing():
    """Zero, -inf and no gradient, never NaN; some in tiles that are computed, some in none."""
    where = rows((290,), (200, 50), total=300)
    q, k, v = arrays(300, 300)

    def outputs(q, k, v):
        return run(pallas, [Part(q, k, causal() & ~window(140))], v, where, where)

    def loss(q, k, v):
        out, lse = outputs(q, k, v)
        return out.sum() + lse.sum(), (out, lse)

    (d_q, d_k, d_v), (out, lse) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    empty = (where.positions_BL < 140) | (where.segments_BL == 0)
    assert not np.asarray(out)[empty].any() and not np.asarray(d_q)[empty].any()
    assert ((np.asarray(lse) == -np.inf).all(-1) == empty).all()
    assert all(np.isfinite(d).all() and np.asarray(d).any() for d in (d_q, d_k, d_v))


def test_what_the_table_leaves_out_is_never_read():
    """NaN among hidden blocks of keys and values does not reach the result."""
    where = rows((512,), (256, 256), total=512)
    q, k, v = arrays(512, 512)
    hidden = jnp.zeros((2, 512, 1, 1)).at[0, :128].set(jnp.nan).at[1, :256].set(jnp.nan)
    part = lambda k: Part(q[:, 384:], k, causal() & window(250))  # noqa: E731
    last = jax.tree.map(lambda x: x[:, 384:], where)
    call = jax.jit(lambda k, v: run(pallas, [part(k)], v, last, where))
    clean, poisoned = call(k, v), call(k + hidden, v + hidden)
    close(poisoned, clean, 0)


def test_blocks_between_two_runs_are_not_loaded():
    """Far sinks and a near window: 16 blocks of keys, of which the last query block loads three."""
    where = rows((2048,), total=2048)
    q_info = jnp.stack([*where[:2][::-1], where.positions_BL - 127, where.positions_BL], 1)
    k_info = jnp.stack(where[:2][::-1], 1)
    sinks_end = q_info.at[:, 3].set(3)
    info = jnp.concatenate([q_info, sinks_end[:, 3:]], 1)
    live, plain = tiles.kinds(info, k_info, ((2, 3), (None, 4)), 128, 128)
    made = tiles.tiles(live, plain)
    runs = Runs(1, 16)
    at = lambda t: Step(0, 0, 15, 0, t)  # noqa: E731
    loaded = [int(runs.loaded(made.by_query, at(t), 0, 1)) for t in range(int(made.key_steps))]
    assert loaded == [0] + [14] * 14 + [15]
    assert [int(runs.loaded(made.by_query, at(t), 1)) for t in range(16)] == [0] * 16
    kinds = [tuple(map(bool, runs.kind(made.by_query, 0, at(j)))) for j in (13, 14, 15)]
    assert kinds == [(False, False), (True, False), (True, False)]


def test_partial_results_merge_to_the_whole():
    """Two calls over halves of the keys, merged by their log-sum-exps, with gradients."""
    where = rows((150, 80, 40), (290,), total=300)
    q, k, v = arrays(300, 300)
    halves = [(slice(0, 140), jax.tree.map(lambda x: x[:, :140], where))]
    halves += [(slice(140, 300), jax.tree.map(lambda x: x[:, 140:], where))]

    def merged(q, k, v):
        some = [run(pallas, [Part(q, k[:, at])], v[:, at], where, half) for at, half in halves]
        lse = jnp.stack([lse for _, lse in some])
        top = jax.lax.stop_gradient(jnp.maximum(lse.max(0), -1e30))
        shares = jnp.exp(lse - top)
        shares = shares / jnp.maximum(shares.sum(0), 1e-30)
        return sum(share[..., None] * out for share, (out, _) in zip(shares, some, strict=True))

    whole = lambda q, k, v: run(reference, [Part(q, k)], v, where, where)[0]  # noqa: E731

    def loss(f, q, k, v):
        out = f(q, k, v)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    grad = jax.jit(jax.grad(loss, (1, 2, 3), has_aux=True), static_argnums=0)
    (d_found, found), (d_expected, expected) = grad(merged, q, k, v), grad(whole, q, k, v)
    close((found, *d_found), (expected, *d_expected))


@st.composite
def cases(draw):
    """A call: documents of two rows, heads, sizes, masks, modifications; nothing in whole tiles."""
    total = draw(st.sampled_from([97, 129, 257, 300, 391]))
    documents = draw(st.tuples(*[st.lists(st.integers(1, total), min_size=1, max_size=5)] * 2))
    fit = [
        tuple(x for x, end in zip(d, np.cumsum(d), strict=True) if end <= total) for d in documents
    ]
    kv_heads, shared = draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    masks = st.sampled_from(sorted(MASKS))
    parts = draw(st.lists(st.tuples(masks, st.sampled_from(sorted(MODS))), min_size=1, max_size=2))
    size = draw(st.sampled_from([16, 40, 128, 136]))
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    return rows(*fit, total=total), kv_heads, shared, size, dtype, parts


def parts_of(chosen, q, k, v, slopes):
    return [Part(q, k, MASKS[mask], MODS[mod](slopes)) for mask, mod in chosen], v


def check_case(case):
    where, kv_heads, shared, size, dtype, chosen = case
    total, heads = where.positions_BL.shape[1], kv_heads * shared
    q, k, v = arrays(total, total, heads, kv_heads, size, jnp.dtype(dtype))

    make = functools.partial(parts_of, chosen)
    arguments = q, k, v, jnp.linspace(0.5, 0.1, heads)
    (*found, d_slopes), (*expected, d_expected) = both(make, arguments, where, where)
    close(found, expected, 2e-5 if dtype == "float32" else 4e-2)
    assert np.isfinite(d_slopes).all()
    if dtype == "float32":
        rounding = np.finfo(np.float32).eps * sums_of_terms(make, arguments, where)
        assert (np.abs(d_slopes - d_expected) <= rounding).all()
    else:
        check_slopes(arguments, chosen, where, d_slopes)


def check_slopes(arguments, chosen, where, d_slopes):
    """In bfloat16: within what rounded outputs leave uncertain."""
    q, k, v, slopes = arguments
    d_out = jnp.cos(jnp.arange(q.size).reshape(q.shape)).astype(v.dtype)
    parts = [
        (q, k, MASKS[mask], 1.5 if mod == "capped bias" else None, "bias" in mod)
        for mask, mod in chosen
    ]
    exact, deviation = slope_oracle.gradient(parts, v, slopes, d_out, where, 0.3)
    terms = sums_of_terms(functools.partial(parts_of, chosen), arguments, where)
    rounding = np.finfo(np.float32).eps * terms
    assert (np.abs(d_slopes - exact) <= 5 * deviation + rounding).all()


@pytest.mark.quick("16-*pallas")
@pytest.mark.parametrize("backend", [pallas, reference, blockwise])
@pytest.mark.parametrize("size", [16, 128])
def test_slopes_in_bfloat16(backend, size):
    """Every backend is as far off as rounding explains, and no further."""
    where, chosen = rows((150, 80, 40), (290,), total=300), [("causal", "bias")]
    arguments = *arrays(300, 300, 4, 2, size, jnp.bfloat16), jnp.linspace(0.5, 0.1, 4)

    def loss(*arguments):
        parts, v = parts_of(chosen, *arguments)
        out = run(backend, parts, v, where, where)[0].astype(jnp.float32)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

    check_slopes(arguments, chosen, where, jax.jit(jax.grad(loss, 3))(*arguments))


@settings(max_examples=2, deadline=None, derandomize=True, database=None)
@given(cases())
def test_random_cases(case):
    check_case(case)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, database=None)
@given(cases())
def test_many_random_cases(case):
    check_case(case)
