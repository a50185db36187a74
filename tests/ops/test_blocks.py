"""Block maps and the patterns made of them, against dense masks built cell by cell."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import ON_CPU, arrays, assert_gradients_equal, packed, small_blocks

from lcm.ops.attention import (
    BlockMap,
    LinearBias,
    Mask,
    Part,
    Softplus,
    attend,
    attend_partial,
    bigbird,
    causal,
    softplus,
    vertical_slash,
)

SIZE, LENGTH = 8, 37  # five blocks, the last of five tokens


@pytest.fixture(params=ON_CPU)
def backend(request, monkeypatch):
    small_blocks(monkeypatch)
    monkeypatch.setattr(softplus, "SCORES", 37 * 8)
    return request.param


def a_map(heads, full=(), seed=0):
    """Two listed blocks of five for each row, and -1, a repeat and a block beyond the end."""
    random = np.random.default_rng(seed)
    rows = [[random.permutation(5)[:2] for _ in range(5)] for _ in range(heads)]
    rows = np.array(rows, np.int32)
    odd = np.broadcast_to(np.array([-1, 5], np.int32), rows.shape)
    return BlockMap(SIZE, np.concatenate([rows, odd, rows[..., :1]], -1), full)


def cells(blocks, length=LENGTH):
    """The map as a dense `[H, L, S]`, in plain loops."""
    seen = np.zeros((blocks.indices_HQN.shape[0], length, length), bool)
    for h, i, j in np.ndindex(seen.shape):
        row = i // blocks.size
        seen[h, i, j] = row in blocks.full or j // blocks.size in blocks.indices_HQN[h, row]
    return seen


def plain(q, k, v, seen, bias=0.0):
    """Attention over a dense `[B, H, L, S]` in jax.nn, and log-sums."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    score = jnp.einsum("blhk,bshk->bhls", q, k) / q.shape[-1] ** 0.5 + bias
    some = seen.any(-1, keepdims=True)
    score = jnp.where(seen | ~some, score, -1e30)
    out = jnp.einsum("bhls,bshk->blhk", jax.nn.softmax(score) * some, v)
    lse = jnp.where(some[..., 0], jax.nn.logsumexp(score, -1), -jnp.inf)
    return out, lse.transpose(0, 2, 1)


def walls(where, is_causal=True):
    """Segments, and causality where asked, as `[B, 1, L, S]`."""
    segments, positions = where.segments_BL, where.positions_BL
    seen = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
    if is_causal:
        seen = seen & (positions[:, None, :] <= positions[:, :, None])
    return seen[:, None]


def weighted(x):
    return (x * jnp.cos(jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape))).sum()


@pytest.mark.parametrize(
    "heads, full, mask", [(1, (), causal()), (4, (1, 4), causal()), (1, (0,), Mask())]
)
def test_values_and_gradients(backend, heads, full, mask):
    """On packed rows with a bias, whose slopes get gradients, and rows that see nothing."""
    given = (*arrays(length=LENGTH, slots=LENGTH), jnp.array([0.5, 0.25, 0.1, 0.0]))
    where, blocks = packed(LENGTH), a_map(heads, full)
    seen = walls(where, mask == causal()) & cells(blocks)
    positions = where.positions_BL
    distance = (positions[:, None, :, None] - positions[:, None, None, :]).astype(np.float32)

    def ours(q, k, v, slopes):
        part = Part(q, k, mask, LinearBias(slopes), blocks)
        return attend_partial([part], v, where, where, backend=backend)

    def theirs(q, k, v, slopes):
        return plain(q, k, v, jnp.asarray(seen), -slopes[:, None, None] * distance)

    def loss(attention):
        def run(*given):
            out, lse = attention(*given)
            return weighted(out) + weighted(jnp.where(lse > -jnp.inf, lse, 0.0)), (out, lse)

        return jax.jit(jax.grad(run, (0, 1, 2, 3), has_aux=True))

    (found, (out, lse)), (expected, (o, l)) = loss(ours)(*given), loss(theirs)(*given)
    assert np.isinf(lse).any() and np.isfinite(lse).any()
    np.testing.assert_allclose(out, o, atol=2e-5)
    np.testing.assert_allclose(lse, l, atol=2e-5)
    assert_gradients_equal(found, expected, 2e-5)


def test_parts_with_and_without_a_map(backend):
    """Maps of two sizes and none: one softmax over all."""
    q, k, v = arrays(length=LENGTH, slots=LENGTH)
    one, other = a_map(1), BlockMap(16, np.array([[[0], [0], [-1]]], np.int32))
    parts = [Part(q, k, causal(), blocks=one), Part(2 * q, k, blocks=other), Part(3 * q, k)]
    where = packed(LENGTH)
    out = jax.jit(lambda: attend(parts, v, where, where, backend=backend))()
    wall = walls(where)
    total, top = 0.0, 0.0
    for scale, shown in ((1, cells(one)), (2, cells(other)), (3, np.ones((1, 1, 1), bool))):
        o, lse = plain(scale * q, k, v, jnp.asarray(wall & shown))
        top, total = top + jnp.exp(lse)[..., None] * o, total + jnp.exp(lse)[..., None]
    np.testing.assert_allclose(out, jnp.where(total > 0, top / total, 0.0), atol=2e-5)


def test_softplus_through_a_map(backend):
    """Counts are of what the map shows: as if the other keys were of another document."""
    q, k, v = arrays(length=16, slots=16)
    blocks = BlockMap(SIZE, np.array([[[0], [1]]], np.int32))

    @jax.jit
    def run(q, k, v, blocks=None):
        return attend([Part(q, k, blocks=blocks)], v, normaliser=Softplus(3), backend=backend)

    whole = run(q, k, v, blocks)
    for half in (slice(0, 8), slice(8, 16)):
        alone = run(q[:, half], k[:, half], v[:, half])
        np.testing.assert_allclose(whole[:, half], alone, atol=1e-5)


def test_queries_of_a_cache(backend):
    """Query blocks count from the first query, key blocks from the first slot."""
    q, k, v = arrays(length=16, slots=40)
    blocks = BlockMap(SIZE, np.array([[[0, 3], [1, 4]]], np.int32))
    out = jax.jit(lambda: attend([Part(q, k, blocks=blocks)], v, backend=backend))()
    seen = np.zeros((16, 40), bool)
    seen[:8, :8] = seen[:8, 24:32] = seen[8:, 8:16] = seen[8:, 32:] = True
    seen &= np.arange(24, 40)[:, None] >= np.arange(40)
    expected, _ = plain(q, k, v, jnp.asarray(seen)[None, None])
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_unlisted_blocks_cost_nothing():
    """FLOPs of the compiled program grow with the list, not with the keys."""

    def flops(length, listed):
        q = k = v = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        indices = jax.ShapeDtypeStruct((1, length // 64, listed), jnp.int32)

        def row(q, k, v, indices):
            return attend([Part(q, k, blocks=BlockMap(64, indices))], v, backend="blockwise")

        jaxpr = jax.make_jaxpr(row)(q, k, v, indices)
        return _matmul_flops(jaxpr.jaxpr)

    assert flops(8192, 4) == 2 * flops(4096, 4) == 4 * flops(4096, 2)
    assert flops(8192, 4) == 2 * 2 * 8192 * 4 * 64 * 16  # two products of 2 L (N C) K


def _matmul_flops(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            a = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([a[i] for i in left]))
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            total += times * _matmul_flops(inner)
    return total


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.indices_HQN[:, :3], r"3 blocks of 8 is not for 37 queries: build it for 5"),
        (lambda m: m.indices_HQN[[0, 0]], r"2 heads is not for 4: give it 1 or 4"),
        (lambda m: m.indices_HQN[0], r"int32 \(5, 5\).* 3 axes"),
        (lambda m: m.indices_HQN.astype(np.float32), r"float32 .* must be integers"),
    ],
)
def test_maps_that_do_not_fit(change, message):
    q, k, v = arrays(length=LENGTH, slots=LENGTH)
    blocks = BlockMap(SIZE, change(a_map(1)))
    with pytest.raises(ValueError, match=message):
        attend([Part(q, k, blocks=blocks)], v)


def test_full_rows_beyond_the_end_are_refused():
    q, k, v = arrays(length=LENGTH, slots=LENGTH)
    with pytest.raises(ValueError, match=r"full rows \(5,\).* 0..4"):
        attend([Part(q, k, blocks=a_map(1, (5,)))], v)


def test_bigbird_is_the_cards():
    """64 blocks: a window of 3, first and last global, 3 random, and what those may not be."""
    blocks = bigbird(4096, heads=3, seed=1)
    assert blocks.indices_HQN.shape == (3, 64, 8) and blocks.full == (0, 63)
    for head in blocks.indices_HQN:
        for row in range(1, 63):
            listed = [b for b in head[row] if b >= 0]
            assert len(set(listed)) == len(listed)
            assert {row - 1, row, row + 1, 0, 63} <= {*listed}
            drawn = {*listed} - {row - 1, row, row + 1, 0, 63}
            assert len(drawn) == 3 and drawn <= {*range(64)}
        assert 62 not in head[1] and 1 not in head[62]
    assert (blocks.indices_HQN[0] != blocks.indices_HQN[1]).any()
    np.testing.assert_array_equal(blocks.indices_HQN, bigbird(4096, heads=3, seed=1).indices_HQN)


def test_the_fixed_part_of_bigbird_is_symmetric_and_draws_are_even():
    seen = cells(bigbird(64 * 2, 2, random=0), 128)[0]
    np.testing.assert_array_equal(seen, seen.T)
    row = bigbird(64 * 2, 2, heads=300).indices_HQN[:, 20]
    drawn = np.delete(np.bincount(row[row >= 0], minlength=64), [0, 19, 20, 21, 63])
    assert abs(drawn.mean() - 300 * 3 / 59) < 1e-9
    assert ((drawn - drawn.mean()) ** 2 / drawn.mean()).sum() < 58 + 5 * (2 * 58) ** 0.5


def test_bigbird_within_a_prefix_and_short():
    listed = bigbird(4096, within=16).indices_HQN[0, 30]
    assert ((listed < 16) | np.isin(listed, [29, 30, 31, 63])).all()
    assert cells(bigbird(16, 8), 16).all()  # two blocks: everything is global
    with pytest.raises(ValueError, match="window 4: choose an odd number"):
        bigbird(64, 8, window=4)


def test_bigbird_attention_is_dense_attention_under_its_mask():
    q, k, v = arrays(length=75, slots=75, batch=1)
    blocks = bigbird(75, 8, random=1)
    out = jax.jit(lambda: attend([Part(q, k, Mask(), blocks=blocks)], v, backend="blockwise"))()
    expected, _ = plain(q, k, v, jnp.asarray(cells(blocks, 75))[None])
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_vertical_slash_finds_what_was_put_in():
    """Keys of block 3 draw all queries, and each query draws the key 16 places before it."""
    length, size = 64, 4
    random = np.random.default_rng(0)
    own = np.linalg.qr(random.normal(size=(128, 128)))[0][:length]
    q, k = np.roll(own, 16, axis=0), own.copy()  # q_i = k_{i - 16}
    bright = np.linalg.qr(random.normal(size=(128, 128)))[0][0]
    q, k = 10 * q + 8 * bright, 10 * k
    k[12:16] += 10 * bright
    as_array = lambda x: jnp.asarray(x, jnp.float32)[None, :, None]  # noqa: E731
    blocks = vertical_slash(as_array(q), as_array(k), size=size, vertical=2, slash=3, last=16)
    found = np.asarray(blocks.indices_HQN)
    assert found.shape == (1, 16, 5)
    for row in range(16):
        expected = {0, 3, row, row - 1, row - 4}
        assert {*found[0, row]} - {-1} == {b for b in expected if 0 <= b <= row}


def test_vertical_slash_sums_and_limits():
    """Sums by blocks equal loops; all columns, or all diagonals, are exact attention."""
    q, k, v = arrays(length=LENGTH, slots=LENGTH)
    run = jax.jit(lambda blocks: attend([Part(q, k, blocks=blocks)], v, backend="blockwise"))
    expected = run(None)
    for vertical, slash in ((5, 1), (1, 5)):
        blocks = vertical_slash(q, k, size=SIZE, vertical=vertical, slash=slash, last=9)
        assert (cells(jax.tree.map(np.asarray, blocks)) | ~np.tri(LENGTH, dtype=bool)).all()
        np.testing.assert_allclose(run(blocks), expected, atol=2e-5)
    few = vertical_slash(q, k, size=SIZE, vertical=2, slash=3, last=9)
    columns, diagonals = _sums(np.asarray(q), np.asarray(k), 9)
    for h in range(4):
        best = {0, 1 + columns[h, 1:].argmax()}
        far = {0, 1, 2 + diagonals[h, 2:].argmax()}
        last = {*few.indices_HQN[h, 4].tolist()} - {-1}
        assert last == best | {4 - d for d in far}
    with pytest.raises(ValueError, match="all 37 keys, here are 9"):
        vertical_slash(q[:, :9], k)


def _sums(q, k, last):
    columns, diagonals = np.zeros((4, 5)), np.zeros((4, 6))
    for b, h, i in np.ndindex(2, 4, last):
        i += LENGTH - last
        p = np.exp(k[b, : i + 1, h // 2] @ q[b, i, h] / 4.0)
        for j, weight in enumerate(p / p.sum()):
            columns[h, j // SIZE] += weight
            share = (i - j) % SIZE / SIZE
            diagonals[h, (i - j) // SIZE] += weight * (1 - share)
            diagonals[h, (i - j) // SIZE + 1] += weight * share
    return columns, diagonals[:, :5]
