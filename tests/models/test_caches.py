"""Caches against lists of tokens, whatever is appended, copied, cut or made longer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm.nn.cache import PagedKVCache, contiguous
from lcm.ops.attention.decode import paged
from lcm.types import Context

ROWS, HEADS, SIZE, SLOTS, CHUNK, SINKS = 3, 2, 4, 16, 4, 3
append, first, rows, insert = (
    jax.jit(lambda cache, *arguments, name=name: getattr(cache, name)(*arguments))
    for name in ("append", "first", "rows", "insert")
)


def numbers(random, *shape: int) -> np.ndarray:
    return random.standard_normal((*shape, HEADS, SIZE)).astype(np.float32)


class Twin:
    """What a cache must hold: for each row its tokens, as (position, segment, key, value)."""

    def __init__(self, cache, whole: bool) -> None:
        self.cache, self.whole, self.rows = cache, whole, [[] for _ in range(ROWS)]
        self.other = [[] for _ in range(ROWS)]

    def append(self, random) -> None:
        shape = (ROWS, CHUNK)
        there = random.random(shape) < 0.7
        positions = random.integers(0, 99, shape).astype(np.int32)
        segments = np.where(there, random.integers(1, 4, shape), 0).astype(np.int32)
        k, v = numbers(random, *shape), numbers(random, *shape)
        if self.whole and max(map(len, self.rows)) + CHUNK > self.cache.slots:
            self.cache = self.cache.longer(2 * self.cache.slots)
        at = Context(jnp.asarray(positions), jnp.asarray(segments), jnp.full(shape, -1))
        self.cache = append(self.cache, jnp.asarray(k), jnp.asarray(v), at)
        for b, n in zip(*np.nonzero(there), strict=True):
            self.rows[b].append((positions[b, n], segments[b, n], k[b, n], v[b, n]))

    def take(self, random) -> None:
        which = random.integers(0, ROWS, ROWS)
        self.cache = rows(self.cache, jnp.asarray(which))
        self.rows = [[*self.rows[i]] for i in which]

    def first(self, random) -> None:
        count = int(random.integers(0, 12))
        self.cache = first(self.cache, jnp.int32(count))
        self.rows = [row[:count] for row in self.rows]

    def insert(self, random) -> None:
        """Some of the tokens of a row of its own, into any row; they are a document then."""
        row, source = (int(i) for i in random.integers(0, ROWS, 2))
        one, tokens = self.cache.rows(jnp.asarray([source])), self.rows[source]
        start = int(random.integers(0, len(tokens) + 1)) if self.whole else 0
        count = int(random.integers(0, len(tokens) - start + 1)) if self.whole else len(tokens)
        self.cache = insert(self.cache, jnp.int32(row), one, jnp.int32(start), jnp.int32(count))
        self.rows[row] = [
            (at, min(segment, 1), k, v) for at, segment, k, v in tokens[start : start + count]
        ]

    def check(self) -> None:
        k_BSGK, v_BSGK, at = (jax.tree.map(np.asarray, x) for x in self.cache.view())
        for b, tokens in enumerate(self.rows):
            kept = tokens
            if not self.whole and len(tokens) > self.cache.slots:
                kept = tokens[:SINKS] + tokens[len(tokens) - self.cache.slots + SINKS :]
            there = np.nonzero(at.segments_BL[b])[0]
            assert len(there) == len(kept) and int(self.cache.used_B[b]) == len(tokens)
            if self.whole:
                assert there.tolist() == [*range(len(kept))]
            held = [(at.positions_BL[b, s], at.segments_BL[b, s], k_BSGK[b, s]) for s in there]
            values = [v_BSGK[b, s] for s in there]
            order = lambda x: (*map(int, x[:2]), *x[2].ravel())  # noqa: E731
            found = sorted(((*x, v) for x, v in zip(held, values, strict=True)), key=order)
            for got, wanted in zip(found, sorted(kept, key=order), strict=True):
                assert got[:2] == wanted[:2]
                np.testing.assert_array_equal(got[2:], wanted[2:])


@pytest.mark.parametrize("kind", ["whole", "ring"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["append"] * 3 + ["take", "insert", "first"]), max_size=14),
       st.integers(0, 99))  # fmt: skip
def test_any_sequence_of_changes(kind, changes, seed):
    random, whole = np.random.default_rng(seed), kind == "whole"
    ring = {} if whole else {"sinks": SINKS, "chunk": CHUNK}
    twin = Twin(contiguous(ROWS, SLOTS, HEADS, SIZE, jnp.float32, **ring), whole)
    for change in changes:
        if whole or change != "first":
            getattr(twin, change)(random)
            twin.check()


def filled(cache, count: int, dtype=jnp.float32, rows: int = 1, step: int = CHUNK):
    """The cache with so many tokens in each row; keys and values, `[B, L, G, K]`."""
    random = np.random.default_rng(count)
    k, v = numbers(random, rows, count), numbers(random, rows, count)
    for start in range(0, count, step):
        size = min(step, count - start)
        at = jnp.broadcast_to(jnp.arange(start, start + size), (rows, size))
        context = Context(at, jnp.ones_like(at), jnp.full_like(at, -1))
        piece = (jnp.asarray(x[:, start : start + size]) for x in (k, v))
        cache = append(cache, *piece, context)
    return cache, k, v


@pytest.mark.parametrize("count", [5, 16, 30])
def test_a_whole_row_in_a_ring(count):
    """The sinks and the latest tokens, each in the slot where an append would have put it."""
    ring = contiguous(ROWS, SLOTS, HEADS, SIZE, jnp.float32, SINKS, CHUNK)
    one, _, _ = filled(contiguous(1, 32, HEADS, SIZE, jnp.float32), count)
    wanted, _, _ = filled(contiguous(1, SLOTS, HEADS, SIZE, jnp.float32, SINKS, CHUNK), count)
    got = insert(ring, jnp.int32(1), one, jnp.int32(0), jnp.int32(count)).rows(jnp.asarray([1]))
    there = np.asarray(wanted.segments_BS[0]) > 0
    np.testing.assert_array_equal(got.segments_BS, wanted.segments_BS)
    for name in ("positions_BS", "k_BGSK", "v_BGSK"):
        x, y = (np.moveaxis(np.asarray(getattr(c, name)), -1 if name == "positions_BS" else 2, 0)
                for c in (got, wanted))  # fmt: skip
        np.testing.assert_array_equal(x[there], y[there])


def test_a_ring_takes_no_more_than_its_chunk():
    ring = contiguous(1, SLOTS, HEADS, SIZE, jnp.float32, SINKS, CHUNK)
    with pytest.raises(ValueError, match="5 tokens for a ring that takes 4 in one call"):
        filled(ring, 5, step=5)
    assert ring.longer(99) is ring


def table(*order: int) -> np.ndarray:
    """Two rows of three pages each."""
    return np.array(order, np.int32).reshape(2, 3)


def pages(places: np.ndarray, dtype=jnp.float32) -> PagedKVCache:
    return PagedKVCache(paged(places, 6, HEADS, SIZE, dtype, page=8))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_numbers_are_within_half_a_step(kind, dtype):
    """int8: |x - x'| <= h / 254, h the largest number of the token and head."""
    places = table(0, 1, 2, 3, 4, 5)
    empty = contiguous(2, 24, HEADS, SIZE, dtype) if kind == "contiguous" else pages(places, dtype)
    cache, k, v = filled(empty, 21, rows=2)
    for got, wanted in zip(cache.view(), (k, v), strict=False):
        error = np.abs(np.asarray(got)[:, :21] - wanted)
        bound = np.abs(wanted).max(-1, keepdims=True) / 254 if dtype == "int8" else 0.0
        assert (error <= bound * (1 + 1e-5)).all()
        assert (error.max() > 0) == (dtype == "int8")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_where_pages_lie_changes_nothing(dtype):
    one, _, _ = filled(pages(table(0, 1, 2, 3, 4, 5), dtype), 21, rows=2)
    two, _, _ = filled(pages(table(4, 0, 5, 2, 3, 1), dtype), 21, rows=2)
    alone, _, _ = filled(contiguous(1, 32, HEADS, SIZE, dtype), 13)
    for cache in (one, two):
        put = insert(cache, jnp.int32(1), alone, jnp.int32(4), jnp.int32(9))
        assert put.cache.lengths_B.tolist() == [21, 9]
    for cache in (
        lambda c: c,
        lambda c: insert(c, jnp.int32(1), alone, jnp.int32(4), jnp.int32(9)),
    ):
        views = [cache(c).view() for c in (one, two)]
        there = np.asarray(views[0][2].segments_BL) > 0
        for x, y in zip(views[0][:2], views[1][:2], strict=True):
            np.testing.assert_array_equal(np.asarray(x)[there], np.asarray(y)[there])
    k, _, at = put.view()
    np.testing.assert_allclose(k[1, :9], alone.view()[0][0, 4:13], atol=1e-6)
    assert at.segments_BL[1].tolist() == [1] * 9 + [0] * 15
    np.testing.assert_array_equal(k[0], two.view()[0][0])


def test_pages_of_another_row_are_left_alone():
    """A row without pages writes nowhere; one that is padding keeps its length."""
    cache, k, _ = filled(pages(table(0, 1, 2, -1, -1, -1)), 5, rows=2)
    np.testing.assert_array_equal(cache.view()[0][0, :5], k[0])
    nothing = jnp.zeros((2, 1), jnp.int32)
    new = jnp.ones((2, 1, HEADS, SIZE))
    after = append(cache, new, new, Context(nothing, nothing, nothing))
    jax.tree.map(
        np.testing.assert_array_equal, dataclasses.asdict(after), dataclasses.asdict(cache)
    )
