"""Block maps through kernels run as plain JAX: values and gradients as in the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import arrays, both, close, rows, run

from lcm.ops.attention import (
    BlockMap,
    LinearBias,
    Mask,
    Part,
    bigbird,
    causal,
    pallas,
    reference,
    vertical_slash,
    window,
)
from lcm.ops.attention.pallas import maps, visits
from lcm.ops.attention.pallas.walk import Step, Visits

pytestmark = pytest.mark.usefixtures("interpreted")

SIDE = 128  # of tiles here


def random_map(size, length, slots, heads, listed, seed=0, full=()):
    """Some blocks for each row, with nothing, repeats and what is beyond the end among them."""
    random = np.random.default_rng(seed)
    shape = heads, -(-length // size), listed
    indices = random.integers(-1, -(-slots // size) + 2, shape).astype(np.int32)
    indices[:, 1 % shape[1]] = -1
    return BlockMap(size, indices, full).clean(slots)


CASES = {
    # length, heads of 4, mask, size, full rows
    "smaller than a tile": (300, 4, causal(), 64, ()),
    "larger than a tile": (700, 1, causal(), 256, ()),
    "of no tile": (391, 4, Mask(), 100, (1,)),
    "small": (257, 1, causal() & window(90), 16, (0, 9)),
    "of one tile": (300, 1, Mask(), 128, (2,)),
}


def slopes_rounding(make, given, where):
    """What float32 leaves uncertain of slopes' gradients, each a sum of `p (dp - delta) (i - j)`.

    Where a query sees few keys dp and delta are nearly the same, so it is of their size and not of
    their difference: eps times `sum_c |do_c| max_j |v_jc|` and the root mean square of `i - j`.
    """
    (parts, v), at = make(*given), jnp.asarray(where.positions_BL, jnp.float32)[:, :, None, None]
    heads = jnp.broadcast_to(jnp.concatenate([at, at**2], -1), (*v.shape[:3], 2))
    first, second = jnp.moveaxis(run(reference, parts, heads, where, where)[0], -1, 0)
    square = at[..., 0] ** 2 - 2 * at[..., 0] * first + second
    q = given[0]
    d_out = jnp.abs(jnp.cos(jnp.arange(q.size).reshape(q.shape)))
    highest = jnp.repeat(jnp.abs(v).max(1), q.shape[2] // v.shape[2], axis=1)[:, None]
    size = (d_out * highest).sum(-1) * jnp.sqrt(jnp.maximum(square, 0)) * (first != 0)
    return np.finfo(np.float32).eps * size.sum((0, 1))


@pytest.mark.quick("small-False")
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_random_maps(name, traced):
    length, heads, mask, size, full = CASES[name]
    blocks = random_map(size, length, length, heads, 3, full=full)
    if traced:
        blocks = BlockMap(size, jnp.asarray(blocks.indices_HQN), full)
    where = rows((length // 2, length // 3), (length - 3,), total=length)

    def make(q, k, v, slopes):
        return [Part(q, k, mask, LinearBias(slopes), blocks)], v

    given = *arrays(length, length, 4, 2), jnp.linspace(0.5, 0.1, 4)
    (*found, d_slopes), (*expected, d_expected) = both(make, given, where, where)
    close(found, expected, 2e-5)
    assert (np.abs(d_slopes - d_expected) <= slopes_rounding(make, given, where)).all()


def test_bigbird_in_bfloat16():
    where = rows((330,), (200, 90), total=330)
    blocks = bigbird(330, 32, random=2, heads=2)
    make = lambda q, k, v: ([Part(q, k, Mask(), blocks=blocks)], v)  # noqa: E731
    close(*both(make, arrays(330, 330, dtype=jnp.bfloat16), where, where), 3e-2)


def test_vertical_slash_is_traced():
    where = rows((330,), (200, 90), total=330)

    def make(q, k, v):
        blocks = vertical_slash(q, k, size=32, vertical=2, slash=3, last=32)
        return [Part(q, k, causal(), blocks=blocks)], v

    close(*both(make, arrays(330, 330, 4, 2), where, where), 2e-5)


def test_parts_with_other_maps_and_without():
    where = rows((150, 80, 40), (290,), total=300)
    one, other = random_map(64, 300, 300, 4, 2), random_map(100, 300, 300, 1, 1, seed=1)

    def make(q, k, v, slopes):
        near = Part(q, k, causal() & window(20), LinearBias(slopes))
        return [near, Part(2 * q, k, causal(), blocks=one), Part(q, 2 * k, blocks=other)], v

    given = *arrays(300, 300, 4, 2), jnp.linspace(0.5, 0.1, 4)
    close(*both(make, given, where, where), 2e-5)


def test_queries_of_a_cache():
    """Query blocks count from the first query, key blocks from the first slot."""
    blocks, (k_where, q_where) = random_map(64, 130, 390, 2, 2), (rows((390,) * 1, total=390),) * 2
    q_where = jax.tree.map(lambda x: x[:, 260:], q_where)
    q, k, v = (x[:1] for x in arrays(130, 390))
    make = lambda q, k, v: ([Part(q, k, causal(), blocks=blocks)], v)  # noqa: E731
    close(*both(make, (q, k, v), q_where, k_where), 2e-5)


def test_rows_without_a_block_are_zero():
    where = rows((300,), (300,), total=300)
    q, k, v = arrays(300, 300)
    blocks = BlockMap(150, np.array([[[0], [-1]]], np.int32))

    def outputs(q, k, v):
        return run(pallas, [Part(q, k, causal(), blocks=blocks)], v, where, where)

    def loss(q, k, v):
        out, lse = outputs(q, k, v)
        return out.sum() + lse.sum(), (out, lse)

    d, (out, lse) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    assert not out[:, 150:].any() and np.isneginf(lse[:, 150:]).all() and out[:, :150].all()
    assert all(np.isfinite(x).all() and not np.asarray(x[:, 150:]).any() for x in d)


def test_tiles_that_are_not_listed_are_never_read():
    """NaN in their keys and values does not reach the result, nor in queries the gradients."""
    where = rows((512,), (512,), total=512)
    q, k, v = arrays(512, 512)
    blocks = BlockMap(128, np.array([[[0, 2], [0, 2], [2, -1], [0, 2]]], np.int32))
    hidden = jnp.zeros((2, 512, 1, 1)).at[:, 128:256].set(jnp.nan).at[:, 384:].set(jnp.nan)
    part = lambda q, k: Part(q, k, Mask(), blocks=blocks)  # noqa: E731
    call = jax.jit(lambda k, v: run(pallas, [part(q, k)], v, where, where))
    close(call(k + hidden, v + hidden), call(k, v), 0)

    @jax.jit
    def d_keys(q):
        return jax.grad(lambda k: run(pallas, [part(q, k)], v, where, where)[0][:, 256:].sum())(k)

    lone = jnp.zeros((2, 512, 1, 1)).at[:, 256:384].set(jnp.nan)  # queries that see 2 alone
    close([d_keys(q + lone)[:, :256]], [d_keys(q)[:, :256]], 0)


def test_visits_are_what_is_listed():
    """Each listed tile once, blocks in order, with one visit for a block without."""
    live = np.random.default_rng(0).random((2, 1, 4, 3, 5)) < 0.3
    live[:, :, :, 1] = False
    plain = live & (np.random.default_rng(1).random(live.shape) < 0.5)
    room = visits.Room(4, 2, 15, 33)
    made = visits.visits(jnp.asarray(live), jnp.asarray(plain), room, 2, 2)
    for head in range(4):
        walk, found = Visits(1, 4, 15), []
        for t in range(int(made.key_steps)):
            step = Step(0, head, 0, 0, t)
            own, other = int(walk.own(made.by_query, step)), int(walk.other(made.by_query, step))
            kinds = [tuple(map(bool, walk.kind(made.by_query, n, step))) for n in (0, 1)]
            found.append((own, other, kinds, *map(bool, walk.ends(made.by_query, step, 1, 0))))
        every = [
            (
                i,
                j,
                [
                    (live[n, 0, head, i, j] & ~plain[n, 0, head, i, j], plain[n, 0, head, i, j])
                    for n in (0, 1)
                ],
            )
            for i, j in np.ndindex(3, 5)
            if live[:, 0, head, i, j].any() or (j == 0 and not live[:, 0, head, i].any())
        ]
        assert [x[:3] for x in found[: len(every)]] == every
        assert not any(any(sum(kinds, ())) or a or b for _, _, kinds, a, b in found[len(every) :])
        assert [x[0] for x in found if x[3]] == [x[0] for x in found if x[4]] == [0, 1, 2]
    for group in range(2):
        walk, found = Visits(1, 2, 33), set()
        for t in range(int(made.query_steps)):
            step = Step(0, group, 0, 0, t)
            if any(any(walk.kind(made.by_key, n, step)) for n in (0, 1)):
                head = 2 * group + int(walk.shared(made.by_key, step))
                own, other = walk.own(made.by_key, step), walk.other(made.by_key, step)
                found.add((head, int(other), int(own)))
        expected = np.argwhere(live.any((0, 1)))
        assert found == {tuple(map(int, x)) for x in expected if x[0] // 2 == group}


@pytest.mark.quick("24", "100", "256")
@pytest.mark.parametrize("size", [24, 64, 100, 128, 256, 300])
def test_kinds_of_tiles(size):
    """Some and all of what a tile holds, against the map as a dense array."""
    blocks = random_map(size, 700, 900, 3, 3, full=(1,))
    blocks.indices_HQN[:, 2] = np.arange(blocks.indices_HQN.shape[2])
    tiles = 6, 8
    some, every = maps.kinds(blocks, 900, tiles, (SIDE, SIDE))
    traced = BlockMap(size, jnp.asarray(blocks.indices_HQN), blocks.full)
    for a, b in zip(maps.kinds(traced, 900, tiles, (SIDE, SIDE)), (some, every), strict=True):
        np.testing.assert_array_equal(a, b)
    dense = np.asarray(blocks.shows(jnp.arange(700), 900))
    pad = lambda value: np.pad(  # noqa: E731
        dense, ((0, 0), (0, 768 - 700), (0, 1024 - 900)), constant_values=value
    ).reshape(3, 6, SIDE, 8, SIDE)
    np.testing.assert_array_equal(some, pad(False).any((2, 4)))
    np.testing.assert_array_equal(every[:, :, :7], pad(True).all((2, 4))[:, :, :7])
    most = maps.most(blocks, 700, tiles, (SIDE, SIDE))
    assert (some.sum(2) <= most).all() and most.max() <= 8


def test_what_does_not_fit_names_the_way_out(monkeypatch):
    where = rows((300,), total=300)
    q, k, v = (x[:1] for x in arrays(300, 300))
    tiny = BlockMap(4, np.zeros((1, 75, 1), np.int32))
    with pytest.raises(ValueError, match=r"blocks of 4 tokens .* at least 5, or backend"):
        run(pallas, [Part(q, k, blocks=tiny)], v, where, where)
    monkeypatch.setattr(visits, "WORDS", 10)
    blocks = BlockMap(64, np.zeros((2, 5, 1), np.int32))
    with pytest.raises(ValueError, match=r"maps of 2 heads and 1 rows take .* at most 10 .*block"):
        run(pallas, [Part(q, k, blocks=blocks)], v, where, where)


def test_what_fits_is_known_before(monkeypatch):
    q, k, _ = arrays(300, 300)
    part = Part(q, k, blocks=random_map(64, 300, 300, 2, 3))
    traced = jax.jit(lambda part: jnp.array(pallas.fits((part, Part(q, k)))))
    assert pallas.fits((Part(q, k),)) and pallas.fits((part,)) and traced(part)
    assert not pallas.fits((Part(q, k, blocks=BlockMap(4, np.zeros((1, 75, 1), np.int32))),))
    monkeypatch.setattr(visits, "WORDS", 10)
    assert not pallas.fits((part,)) and pallas.fits((Part(q, k),))
