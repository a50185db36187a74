"""Work counted in a jaxpr against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from lcm import aot
from lcm.ops import attention
from lcm.ops.attention import Part
from lcm.ops.attention.mask import causal, window
from lcm.ops.attention.spread import Spread
from tests.aot.test_program import needs_libtpu

A = jax.ShapeDtypeStruct((3, 5), jnp.float32)
B = jax.ShapeDtypeStruct((5, 7), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((4, 4), jnp.float32)
ONE = 2 * 4**3  # FLOPs of a product of two of them


def stacked(x, w):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]


def test_a_product():
    assert aot.work(jnp.matmul, A, B) == (2 * 3 * 5 * 7, 0, ())


def test_gradients_of_a_product_are_two_more():
    loss = lambda a, b: (a @ b).sum()  # noqa: E731
    assert aot.work(jax.value_and_grad(loss, (0, 1)), A, B).flops == 3 * 2 * 3 * 5 * 7


def test_a_batch_of_products():
    spec = "bgmk,bgsk->bgms"
    q, k = (jax.ShapeDtypeStruct((2, 3, n, 8), jnp.float32) for n in (5, 7))
    assert aot.work(lambda q, k: jnp.einsum(spec, q, k), q, k).flops == 2 * 2 * 3 * 5 * 7 * 8


def test_scans_count_as_often_as_they_are_long():
    w = jax.ShapeDtypeStruct((6, 4, 4), jnp.float32)
    assert aot.work(stacked, SQUARE, w).flops == 6 * ONE
    inner = lambda x, w: jax.lax.scan(lambda x, _: (stacked(x, w), None), x, None, length=5)[0]  # noqa: E731
    assert aot.work(jax.jit(inner), SQUARE, w).flops == 5 * 6 * ONE


def test_recomputation_is_work():
    w = jax.ShapeDtypeStruct((6, 4, 4), jnp.float32)
    body = jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(x @ w) @ w))
    loss = lambda x, w: jax.lax.scan(lambda x, w: (body(x, w), None), x, w)[0].sum()  # noqa: E731
    plain = lambda x, w: jax.lax.scan(  # noqa: E731
        lambda x, w: (body.__wrapped__(x, w), None), x, w
    )[0].sum()
    again = aot.work(jax.grad(loss), SQUARE, w).flops - aot.work(jax.grad(plain), SQUARE, w).flops
    assert again in (6 * ONE, 2 * 6 * ONE)  # one product or both, as jax prunes


def test_the_larger_branch_and_loops_of_unknown_length():
    branches = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)  # noqa: E731
    assert aot.work(branches, SQUARE).flops == 2 * ONE
    loop = lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)  # noqa: E731
    assert aot.work(loop, SQUARE) == (ONE, 0, ("while",))


def test_a_convolution():
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 3, 10), (5, 3, 4)))
    convolve = lambda x, w: jax.lax.conv(x, w, (1,), "VALID")  # noqa: E731
    assert aot.work(convolve, x, w).flops == 2 * (2 * 5 * 7) * (3 * 4)


def test_all_devices_of_a_shard_map():
    mesh = AbstractMesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("x")
    rows = {"in_specs": spec, "out_specs": spec, "axis_names": {"x"}}
    own = jax.shard_map(lambda x: x @ x.T @ x, mesh=mesh, **rows)  # [1, 4] on each of 4
    assert aot.work(own, SQUARE).flops == 4 * (2 * 4 + 2 * 4)


@pytest.mark.parametrize("estimate", [None, 1234])
def test_kernels_by_their_estimate(estimate):
    cost = estimate and pl.CostEstimate(flops=estimate, bytes_accessed=0, transcendentals=0)

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] @ x_ref[...]

    call = pl.pallas_call(kernel, SQUARE, cost_estimate=cost, name="square")
    fn = lambda x: jax.lax.scan(lambda x, _: (call(x), None), x, None, length=3)[0]  # noqa: E731
    found = aot.work(fn, SQUARE)
    assert found == ((0, 3 * 1234, ()) if estimate else (0, 0, ("square",)))


@needs_libtpu
@pytest.mark.parametrize(
    ("how", "order", "mask", "tiles"),
    [
        ("ring", "plain", causal(), 8 * 9 / 2),
        ("ring", "zigzag", causal(), 8 * 9 / 2),
        ("gather", "zigzag", causal(), 8 * 9 / 2),
        ("ulysses", "plain", causal(), 8 * 9 / 2),
        # Tiles of every fourth of 4,096 tokens: the diagonal cuts half of them, one is empty.
        ("ring", "striped", causal(), 64 * 3 / 4),
        ("ring", "zigzag", causal() & window(512), 8 + 7),
    ],
)
def test_kernels_of_shards_state_what_masks_leave(how, order, mask, tiles):
    """On the mean over devices and steps, in tiles of 1,024 of 8,192 tokens on four devices."""
    heads, mesh = 4, aot.mesh("v5e:2x2", (4,), ("context",))
    x = jax.ShapeDtypeStruct((1, 8192, heads, 128), jnp.bfloat16)
    over = Spread(how, order)
    attend = lambda q, k, v: attention.attend([Part(q, k, mask)], v, over=over)  # noqa: E731
    with jax.set_mesh(mesh):
        found = aot.work(attend, x, x, x)
    assert found.kernels == 2 * 2 * heads * 128 * tiles * 1024**2


def test_a_whole_step_of_training_is_near_the_formula(tiny):
    """What the model states in closed form, three times for a step, is what its jaxpr holds."""
    import lcm
    from lcm import models, training
    from lcm.types import Batch

    cfg = tiny("model.remat=none", "model.backend=reference")
    spec, rule = models.spec(cfg), training.optimizer(cfg.train)
    state = jax.eval_shape(lambda key: training.init_state(spec, rule, key, 0.0), jax.random.key(0))
    shape = cfg.train.batch, cfg.data.length
    tokens = jnp.zeros(shape, jnp.int32)
    batch = Batch(tokens, tokens, models.default_context(shape), jnp.ones(shape))
    found = aot.work(training.make_step(spec, rule, cfg), state, batch).flops
    stated = lcm.flops_per_token(cfg, cfg.data.length) * tokens.size
    assert stated < found < 1.5 * stated  # dense attention computes the hidden half as well
