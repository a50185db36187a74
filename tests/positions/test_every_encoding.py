"""What must hold for each encoding alone, in one loop over all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CHAINS, DIMS, LENGTH, NAMES, arrays, attended, context, make, parameters

from lcm import positions
from lcm.types import Context

ALL = NAMES + CHAINS


@functools.cache
def case(name: str):
    encoding = make(name)
    encoding.check(DIMS)
    params = parameters(encoding)
    return encoding, params, encoding.prepare(params)


# One of each kind; the others are slow.
QUICK = [
    *("learned", "rope", "yarn", "dynamic_ntk", "clex"),
    *("self_extend", "dual_chunk", "lm_infinite", "reattention", "alibi"),
    *("t5", "fire", "cope", "log_n+yarn", "chunked+rope"),
]


@pytest.mark.quick(*QUICK)
@pytest.mark.parametrize("name", ALL)
def test_decode_equals_prefill_at_every_length(name):
    """One token against a cache equals the last of a prefill, at lengths on both sides of switches.

    Lengths run from 1 to three times the trained one, so through each change of scale or region.
    """
    encoding, _, params = case(name)
    q, k, v = arrays()
    whole = context()
    cached = encoding.keys(params, k, whole)
    lengths = jnp.arange(1, LENGTH + 1)

    def upto(n: jax.Array) -> Context:
        return whole._replace(segments_BL=jnp.where(whole.positions_BL < n, 1, 0))

    def prefill(n: jax.Array) -> jax.Array:
        out = attended(encoding, params, q, k, v, upto(n))
        return jax.lax.dynamic_index_in_dim(out[0], n - 1, keepdims=False)

    def step(n: jax.Array) -> jax.Array:
        new = jax.lax.dynamic_slice_in_dim(q, n - 1, 1, 1)
        where = jnp.full((1, 1), n - 1)
        here = Context(where, jnp.ones_like(where), jnp.full_like(where, -1))
        return encoding.attend(params, new, cached, v, here, upto(n))[0, 0]

    def mine(f):
        return np.asarray(jax.jit(lambda: jax.lax.map(f, lengths))())

    np.testing.assert_allclose(mine(step), mine(prefill), atol=2e-5)


@pytest.mark.quick(*QUICK)
@pytest.mark.parametrize("name", ALL)
def test_packed_documents_are_alone_and_nothing_looks_ahead(name):
    encoding, _, params = case(name)
    q, k, v = arrays(1)
    sizes = [9, 1, 12]  # and two places of padding
    starts = np.cumsum([0, *sizes[:-1]])
    places = np.concatenate([*(np.arange(n) for n in sizes), [0, 0]]).astype(np.int32)[None]
    segments = np.concatenate([*([i + 1] * n for i, n in enumerate(sizes)), [0, 0]])
    segments = segments.astype(np.int32)[None]
    unset = np.full_like(places, -1)
    packed = Context(jnp.asarray(places), jnp.asarray(segments), jnp.asarray(unset))
    run = jax.jit(lambda q, k, v, where: attended(encoding, params, q, k, v, where))
    together = run(q, k, v, packed)
    assert np.all(np.isfinite(together))
    np.testing.assert_array_equal(together[:, 22:], 0)
    for start, size in zip(starts, sizes, strict=True):
        alone = context()._replace(segments_BL=jnp.asarray((np.arange(LENGTH) < size) * 1)[None])
        rolled = [jnp.roll(x, -start, 1) for x in (q, k, v)]
        got = together[:, start : start + size]
        np.testing.assert_allclose(got, run(*rolled, alone)[:, :size], atol=2e-5)
    changed = [x.at[:, 15:].set(7.0) for x in (q, k, v)]
    np.testing.assert_allclose(run(*changed, packed)[:, :15], together[:, :15], atol=1e-6)


@pytest.mark.quick(*QUICK)
@pytest.mark.parametrize("name", ALL)
def test_parameters_get_finite_gradients(name):
    encoding, params, _ = case(name)
    q, k, v = arrays(2)
    x = jax.random.normal(jax.random.key(3), (1, LENGTH, DIMS.width))
    left = jnp.arange(LENGTH - 1, -1, -1)[None]
    where = context()._replace(remaining_BL=left, interval_BL=left / 7)

    @jax.jit
    @jax.grad
    def gradient(args):
        params, q, k, v = args
        params = encoding.prepare(params)
        out = attended(encoding, params, q, k, v, where)
        return (out**2).sum() + (encoding.embed(params, x, where) ** 2).sum()

    d_params, *d_qkv = gradient((params, q, k, v))
    for leaf in jax.tree.leaves(d_params):
        assert np.all(np.isfinite(leaf))
    for leaf in d_qkv:
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf != 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(d_params):
        fixed = path[-1].key in ("scale", "temperature")  # on purpose
        assert np.any(leaf != 0) != fixed, path


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_it_is(name):
    about = positions.ENCODINGS[name].about
    assert about.title and about.formula and about.source
    assert about.training in ("from scratch", "tune", "none")
    assert positions.ENCODINGS[name].__doc__
