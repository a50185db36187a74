"""Schedules of our TPU decode kernel beside jax's paged and ragged paged attention; no TPU needed.

    pip install 'jax[tpu]'
    JAX_PLATFORMS=cpu python tests/benchmarks/decode_kernels.py          # v5e and v5p, 3 minutes

One query a row, 32 query heads and 8 key heads of 128, 8 rows of 4096 tokens in pages of 128, which
all read by a table. A bundle is a cycle; branches are all counted once and loops not multiplied.
What one pass through a kernel's body does differs, so bundles of kernels do not compare:

    ours      a step: 512 tokens of the cache for all 8 key heads
    paged     an iteration: 512 tokens for one key head, 8 times for what a step of ours does
    ragged    an iteration: 512 tokens for all 8 key heads and a block of 8 queries, of which the
              row's own is one: it is made for prefills in the same batch

What compares is what a token adds, bundles of bodies of 1024 tokens less those of 512, times the
key heads that are taken one by one. That leaves out what is done once a row or once a pass.

    per token       bundles that a token adds, for all its key heads
    bound           cycles that its bytes take to arrive at the published bandwidth of the chip: a
                    kernel with less per token waits for memory, one with more for its own schedule
    the rest        of the whole kernel with a body of 512 tokens; matmuls are instructions

For int8 ours reads a float32 scale for each head and token, paged float32 scales as wide as the
keys, four times their bytes, and ragged takes one scale for all, so it is less exact.
"""

import argparse

import jax
import jax.numpy as jnp

from lcm import aot

BATCH, HEADS, KV_HEADS, SIZE, SLOTS, PAGE = 8, 32, 8, 128, 4096, 128
PAGES = BATCH * SLOTS // PAGE
TOKENS = 512
# Published bytes and bfloat16 FLOPs a second of a chip, whose cores do 131,072 FLOPs a cycle:
# cloud.google.com/tpu/docs/v5e and v5p
CHIPS = {"v5e:2x2": (0.82e12, 197e12), "v5p:2x2x1": (2.77e12, 459e12)}

_shape = jax.ShapeDtypeStruct
Q = _shape((BATCH, HEADS, SIZE), jnp.bfloat16)
LENGTHS, TABLE = _shape((BATCH,), jnp.int32), _shape((BATCH, SLOTS // PAGE), jnp.int32)


def ours(tokens: int, dtype: str) -> tuple:
    """Our kernel in steps of so many tokens."""
    from lcm.ops.attention import causal
    from lcm.ops.attention.decode import Cache, kernel

    kernel.TOKENS = tokens
    pages = _shape((PAGES, PAGE, KV_HEADS * SIZE), dtype)
    scale = _shape((PAGES, KV_HEADS, PAGE), jnp.float32) if dtype == "int8" else None
    cache = Cache(pages, pages, TABLE, LENGTHS, scale, scale, KV_HEADS)
    run = lambda q, cache: kernel.decode(q[:, None], cache, causal(), None, None, 1.0)  # noqa: E731
    return run, (Q, cache)


def paged(tokens: int, dtype: str) -> tuple:
    """jax's paged attention with as many pages a compute block."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
    from jax.experimental.pallas.ops.tpu.paged_attention.quantization_utils import QuantizedTensor

    pages = _shape((KV_HEADS, PAGES, PAGE, SIZE), dtype)
    if dtype == "int8":
        pages = QuantizedTensor(pages, _shape((KV_HEADS, PAGES, PAGE, 1), jnp.float32))

    def run(q, k, v, lengths, table):
        return paged_attention(q, k, v, lengths, table, pages_per_compute_block=tokens // PAGE)

    return run, (Q, pages, pages, LENGTHS, TABLE)


def ragged(tokens: int, dtype: str) -> tuple:
    """jax's ragged paged attention with as many pages a block, one query of each row."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    scale = 0.1 if dtype == "int8" else None
    options = {"num_kv_pages_per_block": tokens // PAGE, "num_queries_per_block": BATCH}
    options |= {"k_scale": scale, "v_scale": scale, "vmem_limit_bytes": 64 << 20}

    def run(q, pages, lengths, table):
        starts, rows = jnp.arange(BATCH + 1, dtype=jnp.int32), jnp.array([BATCH], jnp.int32)
        return ragged_paged_attention(q, pages, lengths, table, starts, rows, **options)

    return run, (Q, _shape((PAGES, PAGE, 2 * KV_HEADS, SIZE), dtype), LENGTHS, TABLE)


# Passes through the body for all key heads, and bytes beside the keys and values of a token in int8
SIDES = {ours: (1, 2 * KV_HEADS * 4), paged: (KV_HEADS, 2 * KV_HEADS * SIZE * 4), ragged: (1, 0)}


def row(side, topology: str, dtype: str) -> str:
    """A line of the table."""
    passes, scales = SIDES[side]
    (one,), (two,) = (
        aot.schedules(side, tokens, dtype, topology=topology).values()
        for tokens in (TOKENS, 2 * TOKENS)
    )
    per_token = passes * (two.bundles - one.bundles) / TOKENS
    size = 2 * KV_HEADS * SIZE * jnp.dtype(dtype).itemsize + (scales if dtype == "int8" else 0)
    bandwidth, peak = CHIPS[topology]
    return (
        f"{topology:9}  {dtype:8}  {side.__name__:6}  {per_token:9.2f}  "
        f"{size * peak / bandwidth / 131_072:5.2f}  {one.bundles:7}  {one.fills:5}  "
        f"{one.spills:6}  {one.matmuls:7}  {one.mxu_use:7.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="*", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "int8"])
    given = parser.parse_args()
    print("topology   cache     kernel  per token  bound  bundles  fills  spills  matmuls  mxu use")
    for topology in given.topologies:
        for dtype in given.dtypes:
            for side in SIDES:
                print(row(side, topology, dtype), flush=True)


if __name__ == "__main__":
    main()
