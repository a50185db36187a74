"""Recurrence kernels compiled for TPUs ahead of time, forward and backward."""

import jax
import jax.numpy as jnp
import pytest

from lcm.ops.recurrence import op_diag, op_matrix


def of_vectors(topology, length, width, dtype):
    """Gradients of `op_diag`; its temporaries are states, gradients and what is added to them."""
    x = jax.ShapeDtypeStruct((2, length, width), dtype)
    return {
        "topology": topology,
        "fn": jax.grad(lambda a, b: jnp.sin(op_diag(a, b)[0]).sum(), (0, 1)),
        "args": (x, x),
        "kernels": 2,
        "flops": 2 * 2 * x.size,
        "temporary": 4 * 4 * x.size + (8 << 20),
    }


def of_matrices(topology, length, groups, heads, states, width, dtype):
    """Gradients of `op_matrix`; its temporaries are states of chunks, and parts of gradients."""
    token = 1, length
    shape = lambda *s, dtype=dtype: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    q, v = shape(*token, groups, states), shape(*token, heads, width)

    def loss(q, k, v, l):
        y, S = op_matrix(q, k, v, l)
        return jnp.sin(y.astype(jnp.float32)).sum() + S.sum()

    kept = -(-length // 128) * heads * states * width
    return {
        "topology": topology,
        "fn": jax.grad(loss, (0, 1, 2, 3)),
        "args": (q, q, v, shape(*token, heads, dtype="float32")),
        "kernels": 2,
        # 2 products with S forward and 5 backward, 1 and 2 within chunks
        "flops": 2 * length * heads * width * (7 * states + 3 * 128),
        "temporary": 4 * (kept + 6 * (2 * q.size * heads // groups + v.size)) + (16 << 20),
    }


def of_erasing(topology, length, groups, heads, states, width, dtype):
    """Gradients of `op_matrix` with `erase`; its temporaries are states of chunks, and gradients
    of what heads share in float32."""
    token = 1, length
    shape = lambda *s, dtype=dtype: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    q, v = shape(*token, groups, states), shape(*token, heads, width)
    l = shape(*token, heads, dtype="float32")

    def loss(q, k, v, l, a, b, rate):
        y, S = op_matrix(q, k, v, l, (a, b, rate))
        return jnp.sin(y.astype(jnp.float32)).sum() + S.sum()

    kept = -(-length // 128) * heads * states * width
    return {
        "topology": topology,
        "fn": jax.grad(loss, tuple(range(7))),
        "args": (q, q, v, l, q, q, l),
        "kernels": 2,
        # 4 products with S forward and 9 backward, 4 and 12 of squares, 4 and 10 with squares
        "flops": 2 * length * heads * (13 * states * width + 128 * (16 * states + 14 * width)),
        "temporary": 4 * (kept + 3 * (4 * q.size * heads // groups + 2 * v.size)) + (16 << 20),
    }


def of_channels(topology, length, erases, groups, heads, states, width, dtype):
    """Gradients of `op_matrix` with decays by channel; its temporaries are states of chunks, and
    gradients of what heads share in float32."""
    token = 1, length
    shape = lambda *s, dtype=dtype: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    q, v = shape(*token, groups, states), shape(*token, heads, width)
    l = shape(*token, heads, states, dtype="float32")

    def loss(q, k, v, l, *erase):
        y, S = op_matrix(q, k, v, l, erase or None)
        return jnp.sin(y.astype(jnp.float32)).sum() + S.sum()

    args = (q, q, v, l, *[shape(*token, groups, states, dtype="float32")] * (2 * erases))
    chunk = 64 if erases else 128
    # Products with S, with squares, and squares of all sizes of halves.
    with_S, with_squares, squares = (13, 14, 4 * 16) if erases else (8, 3, 5 * 4)
    kept = -(-length // chunk) * heads * states * width
    flops = with_S * states * width + chunk * (squares * states + with_squares * width)
    return {
        "topology": topology,
        "fn": jax.grad(loss, tuple(range(len(args)))),
        "args": args,
        "kernels": 2,
        "flops": 2 * length * heads * flops,
        "temporary": 4 * (kept + 3 * (5 * l.size + 2 * v.size)) + (16 << 20),
    }


def test_vectors_compile_for_a_tpu(compiles):
    compiles(of_vectors, [("v5e:2x2", 300, 200, "bfloat16")])


def test_matrices_compile_for_a_tpu(compiles):
    compiles(of_matrices, [("v5e:2x2", 200, 1, 4, 64, 64, "bfloat16")])


def test_erasing_compiles_for_a_tpu(compiles):
    compiles(of_erasing, [("v5e:2x2", 200, 1, 2, 128, 128, "bfloat16")])


def test_channels_compile_for_a_tpu(compiles):
    compiles(of_channels, [("v5e:2x2", 100, True, 1, 1, 128, 128, "bfloat16")])


@pytest.mark.slow
@pytest.mark.parametrize("erases", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (16, 16, 128, 128),
        (8, 8, 64, 64),  # RWKV
        (4, 4, 256, 512),  # GLA in its paper
        (1, 3, 40, 24),
    ],
)
def test_channels_compile_everywhere(compiles, topology, erases, sizes):
    compiles(of_channels, [(topology, 1000, erases, *sizes, t) for t in ("bfloat16", "float32")])


@pytest.mark.slow
@pytest.mark.parametrize(
    "of, groups, heads, states, width",
    [
        *((of_erasing, *s) for s in [(16, 32, 128, 128), (8, 8, 64, 64), (2, 2, 256, 512)]),
        (of_erasing, 1, 3, 40, 24),
        *((of_matrices, *s) for s in [(1, 24, 128, 64), (4, 4, 64, 64), (2, 8, 256, 128)]),
        (of_matrices, 3, 6, 40, 24),
    ],
)
def test_matrices_compile_everywhere(compiles, topology, of, groups, heads, states, width):
    sizes = groups, heads, states, width
    compiles(of, [(topology, 1000, *sizes, t) for t in ("bfloat16", "float32")])


@pytest.mark.slow
@pytest.mark.parametrize("length, width", [(4096, 2560), (32768, 4096), (1000, 90)])
def test_vectors_compile_everywhere(compiles, topology, length, width):
    compiles(of_vectors, [(topology, length, width, t) for t in ("bfloat16", "float32")])
