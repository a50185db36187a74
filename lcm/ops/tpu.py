"""What Pallas kernels for TPUs share."""

from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
VMEM_LIMIT = 32 << 20  # bytes; v5p and v7x have 64 MiB a core, v5e and v6e 128


def parameters(parallel: int, sequential: int) -> pltpu.CompilerParams:
    """Compiler parameters of a grid: axes that may run in any order, then axes that accumulate."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",) * parallel + ("arbitrary",) * sequential,
        vmem_limit_bytes=VMEM_LIMIT,
    )
