"""Every backend of `attend` against loops in NumPy, and against each other by their gradients."""

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    MASKS,
    ON_CPU,
    arrays,
    assert_gradients_equal,
    context,
    packed,
    small_blocks,
)
from jax.test_util import check_grads

from lcm.ops import attention
from lcm.ops.attention import (
    BACKENDS,
    BlockMap,
    LinearBias,
    Part,
    SoftCap,
    Softmax,
    Softplus,
    causal,
    compose,
    sinks,
    window,
)
from lcm.types import Context


def attend(parts, v, q_context=None, k_context=None, *, backend="auto"):
    """`attention.attend` in one compilation, with contexts that are one object where given so."""
    return jax.jit(lambda p, v: attention.attend(p, v, q_context, k_context, backend=backend))(
        parts, v
    )


@pytest.fixture(params=ON_CPU)
def backend(request, monkeypatch):
    small_blocks(monkeypatch)
    return request.param


def check(out, parts, v, q_context, k_context, modify=None, tolerance=2e-5):
    extra = {} if modify is None else {"modify": modify}
    plain = [(np.asarray(q, np.float32), np.asarray(k, np.float32), seen) for q, k, seen in parts]
    expected, _ = oracle.attend(
        plain, np.asarray(v, np.float32), q_context[:2], k_context[:2], **extra
    )
    np.testing.assert_allclose(
        np.asarray(out, np.float32), expected, atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("name", MASKS)
def test_masks_on_packed_rows(backend, name):
    run_mask(backend, name)


@pytest.mark.parametrize("name", ["all", "causal", "window", "beyond", "chunks"])
def test_long_rows_are_looped_over(name, monkeypatch):
    small_blocks(monkeypatch, looped=True)
    run_mask("blockwise", name)


def run_mask(backend, name):
    mask, seen = MASKS[name]
    q, k, v = arrays(length=37, slots=37)
    where = packed(37)
    out = attend([Part(q, k, mask)], v, where, where, backend=backend)
    check(out, [(q, k, seen)], v, where, where)
    assert not np.asarray(out)[where.segments_BL == 0].any()


@pytest.mark.parametrize("heads, kv_heads, size", [(1, 1, 16), (4, 4, 24), (6, 2, 80), (5, 1, 33)])
def test_shared_heads_and_sizes(backend, heads, kv_heads, size):
    q, k, v = arrays(heads=heads, kv_heads=kv_heads, size=size)
    where = packed(21)
    out = attend([Part(q, k)], v, where, where, backend=backend)
    check(out, [(q, k, MASKS["causal"][1])], v, where, where)


@pytest.mark.parametrize("length, slots", [(1, 1), (1, 33), (9, 17), (17, 33), (5, 40)])
def test_queries_are_the_last_places_by_default(backend, length, slots):
    q, k, v = arrays(length, slots)
    k_where = context(np.ones((2, slots)))
    q_where = jax.tree.map(lambda x: x[:, slots - length :], k_where)
    out = attend([Part(q, k)], v, backend=backend)
    check(out, [(q, k, MASKS["causal"][1])], v, q_where, k_where)


def test_cache_with_empty_slots(backend):
    """Positions of keys in any order and slots not yet written, as after a rolling cache."""
    q, k, v = arrays(4, 12)
    q_where = context(np.ones((2, 4)), starts=9)
    order = np.random.default_rng(0).permutation(12).astype(np.int32)
    segments = np.where(order < 10, 1, 0).astype(np.int32)
    k_where = Context(np.stack([order] * 2), np.stack([segments] * 2), np.full((2, 12), -1))
    mask = causal() & window(4)
    out = attend([Part(q, k, mask)], v, q_where, k_where, backend=backend)
    check(out, [(q, k, lambda q, k: q - 4 < k <= q)], v, q_where, k_where)


def test_bfloat16(backend):
    q, k, v = arrays(dtype=jnp.bfloat16)
    where = packed(21)
    out = attend([Part(q, k)], v, where, where, backend=backend)
    assert out.dtype == jnp.bfloat16
    check(out, [(q, k, MASKS["causal"][1])], v, where, where, tolerance=2e-2)


def test_score_modifications(backend):
    q, k, v = arrays()
    where, slopes = packed(21), np.array([0.5, 0.25, 0.1, 0.0], np.float32)
    mod = compose(SoftCap(1.5), LinearBias(slopes))
    out = attend([Part(q, k, causal(), mod)], v, where, where, backend=backend)

    def modify(score, q_pos, k_pos, head):
        return 1.5 * np.tanh(score / 1.5) - slopes[head] * (q_pos - k_pos)

    check(out, [(q, k, MASKS["causal"][1])], v, where, where, modify)


def test_two_parts_are_one_softmax(backend):
    """A split of the visible keys changes nothing; other keys in one part do (LM-Infinite)."""
    q, k, v = arrays(length=37, slots=37)
    where = packed(37)
    run = lambda *parts: attend(parts, v, where, where, backend=backend)  # noqa: E731
    near, far = causal() & window(5), causal() & ~window(5)
    whole = run(Part(q, k, causal()))
    np.testing.assert_allclose(run(Part(q, k, near), Part(q, k, far)), whole, atol=2e-5)
    q2, k2, _ = arrays(length=37, slots=37, seed=1)
    out = run(Part(q, k, near), Part(q2, k2, far & sinks(3)))
    parts = [(q, k, MASKS["window"][1]), (q2, k2, lambda q, k: k <= q - 5 and k < 3)]
    check(out, parts, v, where, where)


def gradients(backend, mask, where, arrays, slopes):
    def loss(q, k, q2, k2, v, slopes):
        mod = compose(SoftCap(2.0), LinearBias(slopes))
        parts = [Part(q, k, mask, mod), Part(q2, k2, ~window(9) & causal())]
        out = attend(parts, v, where, where, backend=backend)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

    return jax.jit(jax.grad(loss, tuple(range(6))))(*arrays, slopes)


@pytest.mark.quick("causal-*", "window-*")
@pytest.mark.parametrize(
    "name, many", [("causal", False), ("window", True), ("prefix", True), ("sinks", True)]
)
def test_gradients_equal_the_reference(name, many, monkeypatch):
    small_blocks(monkeypatch, looped=many)
    q, k, v = arrays(length=37, slots=37)
    q2, k2, _ = arrays(length=37, slots=37, seed=1)
    given = packed(37), (q, k, q2, k2, v), jnp.array([0.5, 0.25, 0.1, 0.0])
    expected = gradients("reference", MASKS[name][0], *given)
    found = gradients("blockwise", MASKS[name][0], *given)
    assert_gradients_equal(found, expected)


def test_gradient_against_finite_differences(backend):
    q, k, v = arrays(length=9, slots=9, size=8)
    where = packed(9)

    def loss(q, k, v, slopes):
        part = Part(q, k, causal(), LinearBias(slopes))
        return (attend([part], v, where, where, backend=backend) ** 2).sum()

    slopes = jnp.array([0.5, 0.25, 0.1, 0.0])
    check_grads(jax.jit(loss), (q, k, v, slopes), order=1, modes=["rev"], atol=0.03, rtol=0.03)


def test_rows_that_see_nothing(backend):
    """Zero output and zero gradient, never NaN: `sinks` beyond reach of a document's start."""
    q, k, v = arrays()
    where = context(np.ones((2, 21)), starts=50)

    def run(q, k, v):
        return attend([Part(q, k, causal() & sinks(3))], v, where, where, backend=backend)

    assert not np.asarray(run(q, k, v)).any()
    for gradient in jax.jit(jax.grad(lambda *a: run(*a).sum(), (0, 1, 2)))(q, k, v):
        assert not np.asarray(gradient).any()


def test_memory_grows_with_length_not_its_square():
    def temporary(length):
        shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        loss = lambda q, k, v: attend([Part(q, k)], v, backend="blockwise").sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(32_768) < 5 * temporary(8192)
    assert temporary(32_768) < 32_768**2 * 4 / 100


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_values_of_another_size_than_keys(backend):
    """Each column of values is summed by itself: those of zeros change nothing."""
    q, k, v = arrays(length=40, slots=40)

    def loss(v, width):
        out = attend([Part(q, k)], jnp.pad(v, [(0, 0)] * 3 + [(0, width)]), backend=backend)
        return (jnp.sin(out) * jnp.arange(40.0)[:, None, None]).sum(), out

    both = jax.value_and_grad(loss, has_aux=True)
    ((_, want), d_want), ((_, got), d_got) = both(v[..., :5], v.shape[-1] - 5), both(v[..., :5], 0)
    assert got.shape == (*q.shape[:-1], 5) and d_got.shape[-1] == 5
    np.testing.assert_allclose(got, want[..., :5], atol=1e-5)
    np.testing.assert_allclose(d_got, d_want, atol=1e-4)


def test_auto_is_a_backend():
    q, k, v = arrays(length=40, slots=40)
    np.testing.assert_allclose(
        attend([Part(q, k)], v), attend([Part(q, k)], v, backend="reference"), atol=2e-5
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: ([], v), "at least one part"),
        (lambda q, k, v: ([Part(q[0], k)], v), "4 axes"),
        (lambda q, k, v: ([Part(q, k), Part(q[:, :5], k)], v), "differ in queries"),
        (lambda q, k, v: ([Part(q, k[:, :5])], v), "do not fit"),
        (lambda q, k, v: ([Part(q[:, :, :3], k)], v), "3 query heads cannot share 2"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    parts, v = change(*arrays())
    with pytest.raises(ValueError, match=message):
        attend(parts, v)


def test_context_and_backend_that_do_not_fit():
    q, k, v = arrays()
    with pytest.raises(ValueError, match=r"q_context .*\(2, 20\)"):
        attend([Part(q, k)], v, packed(20), packed(21))
    with pytest.raises(ValueError, match=r"k_context .*\(2, 20\)"):
        attend([Part(q, k)], v, packed(21), packed(20))
    message = "'flash' is unknown: use one of auto, reference, blockwise"
    with pytest.raises(ValueError, match=message):
        attend([Part(q, k)], v, backend="flash")


def test_a_backend_of_another_platform_is_refused(monkeypatch):
    q, k, v = arrays()
    monkeypatch.setitem(BACKENDS, "kernel", BACKENDS["reference"]._replace(platforms=("tpu",)))
    message = "'kernel' runs on tpu, not on 'cpu': use 'blockwise'"
    with pytest.raises(ValueError, match=message):
        attend([Part(q, k)], v, backend="kernel")
    devices = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=devices)
    with jax.sharding.use_abstract_mesh(mesh):  # as when compiling ahead of time
        assert jax.eval_shape(lambda: attention.attend([Part(q, k)], v, backend="kernel")).shape


def test_auto_leaves_to_blockwise_what_kernels_do_not_compute(monkeypatch):
    """Softplus, and block maps of blocks that are too small, compiled for a TPU."""
    q, k, v = arrays()
    monkeypatch.setitem(BACKENDS, "pallas", BACKENDS["pallas"]._replace(attend=None))
    devices = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=devices)
    blocks = BlockMap(1, np.zeros((1, 21, 1), np.int32))
    with jax.sharding.use_abstract_mesh(mesh):
        for part, normaliser in ((Part(q, k), Softplus()), (Part(q, k, blocks=blocks), Softmax())):
            run = lambda: attention.attend([part], v, normaliser=normaliser)  # noqa: B023, E731
            assert jax.eval_shape(run).shape == q.shape
