"""Recurrence kernels compiled for TPUs ahead of time, forward and backward."""

import jax
import jax.numpy as jnp
import pytest

from lcm.ops.recurrence import op_diag


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


def test_vectors_compile_for_a_tpu(compiles):
    compiles(of_vectors, [("v5e:2x2", 300, 200, "bfloat16")])


@pytest.mark.slow
@pytest.mark.parametrize("length, width", [(4096, 2560), (32768, 4096), (1000, 90)])
def test_vectors_compile_everywhere(compiles, topology, length, width):
    compiles(of_vectors, [(topology, length, width, t) for t in ("bfloat16", "float32")])
