"""Decoding by each backend against loops in NumPy, and against `attend` on the whole sequence."""

import dataclasses

import decode_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm.ops import attention
from lcm.ops.attention import LinearBias, Part, causal, decode, merge, sinks, window
from lcm.ops.attention.decode import Rotation, append, contiguous, kernel, paged
from lcm.ops.attention.decode.cache import quantised
from lcm.positions.rope import RoPE
from lcm.types import Context

LENGTHS = (0, 1, 13, 32, 37, 75)  # of 32 slots: empty, part of a page, full, wrapped
PAGE, PAGES = 8, 4


@pytest.fixture(params=sorted(decode.BACKENDS))
def backend(request, monkeypatch):
    """The kernel runs as plain JAX, in steps of two pages."""
    monkeypatch.setattr(kernel, "interpret", True)
    monkeypatch.setattr(kernel, "TOKENS", 2 * PAGE)
    anywhere = decode.BACKENDS[request.param]._replace(platforms=("cpu",))
    monkeypatch.setitem(decode.BACKENDS, request.param, anywhere)
    return request.param


def run(backend, q, cache, **options):
    """`decode` in one compilation."""
    arrays = {name: options.pop(name) for name in ("score_mod", "rotation") if name in options}
    call = lambda q, cache, arrays: decode.decode(  # noqa: E731
        q, cache, backend=backend, **arrays, **options
    )
    return jax.jit(call)(jnp.asarray(q), cache, arrays)


@pytest.mark.quick("pallas-*")
@pytest.mark.parametrize("name", cases.MASKS)
def test_masks_pages_and_lengths(backend, name):
    mask, seen = cases.MASKS[name]
    rows = cases.documents(LENGTHS, 2, 16)
    q = cases.queries(len(LENGTHS), 3, 4, 16)
    found = run(backend, q, cases.filled(rows, PAGES, PAGE), mask=mask)
    cases.close(found, cases.attend(q, rows, PAGES * PAGE, seen))
    assert not np.asarray(found.out_BLHK[0]).any()
    assert (np.asarray(found.lse_BLH[0]) == -np.inf).all()


@pytest.mark.quick("pallas-*")
@pytest.mark.parametrize(
    "length, heads, kv_heads, size",
    [(1, 1, 1, 33), (1, 6, 3, 64), (16, 4, 1, 24), (2, 4, 4, 80), (5, 2, 1, 256)],
)
def test_shared_heads_and_sizes(backend, length, heads, kv_heads, size):
    rows = cases.documents((21, 38), kv_heads, size)
    q = cases.queries(2, length, heads, size)
    found = run(backend, q, cases.filled(rows, PAGES, PAGE), scale=0.07)
    expected = cases.attend(q, rows, 32, lambda q, k: k <= q, scale=0.07)
    cases.close(found, expected)


@pytest.mark.parametrize("name", cases.MODS)
def test_score_modifications(backend, name):
    make, modify = cases.MODS[name]
    rows = cases.documents((0, 21, 38), 3, 16)
    q = cases.queries(3, 2, 6, 16)
    found = run(backend, q, cases.filled(rows, PAGES, PAGE), score_mod=make(6))
    cases.close(found, cases.attend(q, rows, 32, lambda q, k: k <= q, modify))


@pytest.mark.quick("pallas-24*", "reference-16*")
@pytest.mark.parametrize("size, pairs, factor", [(16, 8, 1.0), (24, 5, 1.3), (128, 64, 0.9)])
def test_rotation_of_raw_keys_is_rotation_before_caching(backend, size, pairs, factor):
    """Angles of the reference are written here once more, in float64."""
    rows = cases.documents((0, 9, 38), 2, size)
    inv_freq = (100.0 ** -np.linspace(0, 1, pairs)).astype(np.float32)

    def rotated(x, first):
        angles = (first + np.arange(len(x)))[:, None, None] * inv_freq.astype(np.float64)
        turns = factor * np.exp(1j * angles)
        pair = (x[..., :pairs] + 1j * x[..., pairs : 2 * pairs]) * turns
        return np.concatenate([pair.real, pair.imag, x[..., 2 * pairs :]], -1).astype(np.float32)

    q = cases.queries(3, 3, 4, size)
    q = np.stack([rotated(x, len(k) - 3) for x, (k, _) in zip(q, rows, strict=True)])
    rotation = Rotation(jnp.asarray(inv_freq), factor)
    found = run(backend, q, cases.filled(rows, PAGES, PAGE), rotation=rotation)
    expected = [(rotated(k, 0), v) for k, v in rows]
    cases.close(found, cases.attend(q, expected, 32, lambda q, k: k <= q), 1e-4)


def test_rotation_is_that_of_the_encoding():
    x = jnp.asarray(cases.queries(2, 5, 3, 16))
    positions = jnp.arange(10).reshape(2, 5)
    rotation = Rotation(*RoPE().frequencies(16, 5))
    np.testing.assert_array_equal(rotation(x, positions), RoPE().rotate(x, positions))


@pytest.mark.parametrize("length, page", [(1, 32), (6, 64)])
def test_int8_within_half_a_step(backend, length, page, monkeypatch):
    """Scores move by at most half a step of each number of a key; weights and values follow."""
    monkeypatch.setattr(kernel, "TOKENS", 64)
    rows = cases.documents((5, 41, 150), 2, 16)
    slots, q = 128, cases.queries(3, length, 4, 16)
    order = jnp.arange(3 * slots // page).reshape(3, -1)[::-1]
    cache = paged(order, order.size, 2, 16, jnp.int8, page)
    for at in range(0, 150, 30):  # each row while it has some left
        padded = [[np.resize(x[at:], (30, 2, 16)) for x in row] for row in rows]
        k, v = (jnp.asarray(np.stack(x)) for x in zip(*padded, strict=True))
        counts = jnp.clip(jnp.asarray([len(k) for k, _ in rows]) - at, 0, 30)
        cache = APPEND(cache, k, v, counts)
    found = run(backend, q, cache)
    out, lse = cases.attend(q, rows, slots, lambda q, k: k <= q)
    step = max(np.abs(x).max() for row in rows for x in row) / 127
    moved = step / 2 * np.abs(q).sum(-1) * 16**-0.5
    some = np.isfinite(lse)
    assert (np.isfinite(found.lse_BLH) == some).all()
    assert (np.abs(found.lse_BLH - np.where(some, lse, 0))[some] <= moved[some] + 1e-5).all()
    largest = max(np.abs(v).max() for _, v in rows)
    bound = np.expm1(2 * moved)[..., None] * largest + step / 2 + 1e-5
    assert (np.abs(found.out_BLHK - out) <= bound).all()
    exact = [[np.asarray(q * s[..., None]) for q, s in map(quantised, row)] for row in rows]
    cases.close(found, cases.attend(q, exact, slots, lambda q, k: k <= q))


APPEND = jax.jit(lambda cache, k, v, counts: append(cache, k, v, counts, ring=True))


def test_bfloat16(backend):
    rows = cases.documents((5, 21, 38), 2, 32)
    q = cases.queries(3, 2, 4, 32)
    cache = cases.filled(rows, 2, 16, jnp.bfloat16)
    found = run(backend, jnp.asarray(q, jnp.bfloat16), cache)
    assert found.out_BLHK.dtype == jnp.bfloat16 and found.lse_BLH.dtype == jnp.float32
    cases.close(found, cases.attend(q, rows, 32, lambda q, k: k <= q), 3e-2)


@pytest.mark.quick("pallas-*3")
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("table", [None, [[5, 2, 0, 7], [1, 3, 4, 6]]])
def test_tokens_appended_and_decoded_are_attention_over_the_sequence(backend, length, table):
    """A ring of 32 slots and a window of 24: 32 >= 24 + 3 - 1."""
    total, start = 45, 15
    q, k, v = (jnp.asarray(cases.queries(2, total, n, 16, n)) for n in (4, 2, 2))
    where = Context(*(jnp.broadcast_to(x, (2, total)) for x in (np.arange(total), 1, -1)))
    mask, mod = causal() & window(24), LinearBias(jnp.asarray(cases.SLOPES[:4]))
    expected = attention.attend([Part(q, k, mask, mod)], v, where, where)
    cache = (
        contiguous(2, 30, 2, 16, jnp.float32, PAGE)
        if table is None
        else paged(table, 8, 2, 16, jnp.float32, PAGE)
    )
    cache = append(cache, k[:, :start], v[:, :start])

    @jax.jit
    def step(cache, q, k, v):
        cache = append(cache, k, v, ring=True)
        return cache, decode.decode(q, cache, mask=mask, score_mod=mod, backend=backend).out_BLHK

    for at in range(start, total, length):
        cache, out = step(cache, *(x[:, at : at + length] for x in (q, k, v)))
        np.testing.assert_allclose(out, expected[:, at : at + length], atol=2e-5)
    assert cache.lengths_B.tolist() == [total, total]


def test_window_and_sinks_merge(backend):
    rows = cases.documents((4, 30), 2, 16)
    q = cases.queries(2, 2, 4, 16)
    cache = cases.filled(rows, PAGES, PAGE)
    near, far = causal() & window(11), causal() & sinks(3) & ~window(11)
    found = merge(run(backend, q, cache, mask=near), run(backend, q, cache, mask=far))
    seen = lambda q, k: k <= q and (k < 3 or k > q - 11)  # noqa: E731
    cases.close(found, cases.attend(q, rows, 32, seen))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(backend, seed):
    rng = np.random.default_rng(seed)
    page, pages = int(rng.choice([8, 16, 24])), int(rng.integers(1, 9))
    slots, kv_heads, size = page * pages, int(rng.integers(1, 4)), int(rng.integers(16, 200))
    heads, length = kv_heads * int(rng.choice([1, 2, 4])), int(rng.integers(1, 17))
    lengths = rng.integers(0, 3 * slots, 3)
    mask, seen = cases.MASKS[rng.choice(sorted(cases.MASKS))]
    rows = cases.documents(lengths, kv_heads, size, seed)
    q = cases.queries(3, length, heads, size, seed)
    cache = cases.filled(rows, pages, page, shuffled=bool(rng.integers(2)))
    cases.close(run(backend, q, cache, mask=mask), cases.attend(q, rows, slots, seen))


def test_rows_grow_by_different_numbers():
    cache = contiguous(3, 8, 1, 2, jnp.float32, 4)
    k = jnp.arange(3 * 20 * 2, dtype=jnp.float32).reshape(3, 20, 1, 2)
    cache = append(cache, k[:, :3], -k[:, :3], jnp.array([0, 2, 3]))
    cache = append(cache, k, -k, jnp.array([1, 0, 13]), ring=True)  # 13 tokens into 8 slots
    assert cache.lengths_B.tolist() == [1, 2, 16]
    slots = np.asarray(cache.k_PTM).reshape(3, 8, 2)
    np.testing.assert_array_equal(slots[0], np.pad(k[0, :1, 0], ((0, 7), (0, 0))))
    np.testing.assert_array_equal(slots[1], np.pad(k[1, :2, 0], ((0, 6), (0, 0))))
    np.testing.assert_array_equal(slots[2], k[2, 5:13, 0])
    np.testing.assert_array_equal(cache.v_PTM, -cache.k_PTM)


@pytest.mark.parametrize("entries", [8, 200])
def test_a_table_by_distance_and_head(backend, entries):
    """Rows of the kernel are of several heads, each with a table of its own."""
    table = np.random.default_rng(0).normal(size=(entries, 6)).astype(np.float32)
    far = lambda xp, q, k: xp.clip(q - k, 0, entries - 1)  # noqa: E731
    mod = jax.tree_util.Partial(
        lambda table, score, q, k, head: score * table[-1, head] + table[far(jnp, q, k), head],
        jnp.asarray(table),
    )
    rows = cases.documents((0, 21, 38), 3, 16)
    q = cases.queries(3, 2, 6, 16)
    found = run(backend, q, cases.filled(rows, PAGES, PAGE), score_mod=mod)
    modify = lambda score, q, k, h: score * table[-1, h] + table[far(np, q, k), h]  # noqa: E731
    cases.close(found, cases.attend(q, rows, 32, lambda q, k: k <= q, modify))


def test_a_table_too_large_for_the_kernel_names_the_way_out(monkeypatch):
    monkeypatch.setattr(kernel, "interpret", True)
    mod = jax.tree_util.Partial(
        lambda table, score, q, k, head: score + table[q - k], jnp.arange(300.0)
    )
    q, cache = cases.queries(1, 1, 1, 16), cases.filled(cases.documents((21,), 1, 16), PAGES, PAGE)
    with pytest.raises(ValueError, match=r"looks up 300 .* at most 256.*backend=\"reference\""):
        kernel.decode(jnp.asarray(q), cache, causal(), mod, None, 0.25)


def test_int8_rounds_to_half_a_step():
    x = jnp.asarray(cases.queries(2, 9, 3, 16)).at[0, 0].set(0.0)
    q, scale = quantised(x)
    error = np.abs(np.asarray(q, np.float32) * np.asarray(scale)[..., None] - x)
    assert (error <= np.asarray(scale)[..., None] / 2 * 1.0001).all()
    assert np.abs(np.asarray(q)).max() == 127


def token(batch=2, length=1, heads=2, size=16):
    return jnp.ones((batch, length, heads, size))


def test_errors_of_append():
    cache = contiguous(2, 16, 2, 16, jnp.float32, 8)
    with pytest.raises(ValueError, match=r"row 0 has 0 tokens and gets 17.*hold 16.*ring=True"):
        append(cache, token(length=17), token(length=17))
    holes = dataclasses.replace(cache, table_BN=jnp.array([[0, 1], [2, -1]]))
    append(holes, token(length=8), token(length=8))
    with pytest.raises(ValueError, match=r"row 1 .*gets 9.*no page there.*in place of -1"):
        append(holes, token(length=9), token(length=9))
    with pytest.raises(ValueError, match=r"do not fit the cache, which takes \(2, 1, 2, 16\)"):
        append(cache, token(heads=1), token(heads=1))
    with pytest.raises(ValueError, match=r"counts_B has shape \(3,\)"):
        append(cache, token(), token(), jnp.ones(3, jnp.int32))


def test_errors_of_decode(backend):
    cache = contiguous(2, 16, 2, 16, jnp.float32, 8)

    def raises(match, q=token(), cache=cache, **options):  # noqa: B008
        with pytest.raises(ValueError, match=match):
            decode.decode(q, cache, backend=options.pop("backend", backend), **options)

    raises("1 to 16 queries a row, here are 17: use attend", token(length=17))
    raises("3 query heads cannot share 2 key heads", token(heads=3))
    raises("queries of size 8 do not fit keys of 16", token(size=8))
    raises("queries of 3 rows do not fit a cache of 2", token(3))
    raises("a rotation of 9 pairs is not for heads of 16", rotation=Rotation(jnp.ones(9)))
    raises("'fast' is unknown: use one of auto", backend="fast")
    change = lambda **fields: dataclasses.replace(cache, **fields)  # noqa: E731
    raises("table_BN has shape .*must have 2 rows", cache=change(table_BN=jnp.ones((3, 2), int)))
    raises("lengths_B has shape", cache=change(lengths_B=jnp.ones((2, 1), int)))
    raises("4 pages are not the same number", cache=change(lengths_B=jnp.ones(3, int)))
    ints = {name: getattr(cache, name).astype(jnp.int8) for name in ("k_PTM", "v_PTM")}
    raises(r"k_scale_PGT is None.*must be \(4, 2, 8\): build caches with", cache=change(**ints))
