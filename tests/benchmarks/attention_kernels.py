"""Schedules of our TPU attention kernels beside jax's splash attention; no TPU is needed.

    pip install 'jax[tpu]'
    JAX_PLATFORMS=cpu python tests/benchmarks/attention_kernels.py          # v5e and v5p, 2 minutes

Causal, 8 heads of 128, bfloat16, 4096 tokens, equal blocks. A bundle is a cycle; branches are all
counted once and loops not multiplied, so figures of one size of block compare with each other:

    bundles, spills     of the whole kernel. Ours has two bodies, one for tiles that are visible
                        throughout and one for tiles that a mask cuts, and a tile runs one of them:
                        about half of what is printed. Splash has one, which masks.
    mxu                 share of matrix slots in use
"""

import argparse

import jax
import jax.numpy as jnp

from lcm import aot

LENGTH, HEADS, SIZE = 4096, 8, 128
KERNELS = "forward", "dq", "dk, dv"


def ours(block: int) -> tuple:
    """The gradient of our attention with tiles of `block`."""
    from lcm.ops.attention import Part, pallas
    from lcm.ops.attention.pallas import plan

    plan.LARGEST = block
    x = jax.ShapeDtypeStruct((1, LENGTH, HEADS, SIZE), jnp.bfloat16)
    where = _one_document()

    def loss(q, k, v):
        return pallas.attend((Part(q, k),), v, where, where, 1.0).out_BLHK.astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2)), (x, x, x)


def splash(block: int) -> tuple:
    """The gradient of jax's attention with the same tiles, in kernels for dq and for dk, dv."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute"
    sizes = kernel.BlockSizes(**dict.fromkeys([*names.split(), "block_q_dq", "block_kv_dq"], block))
    mask = masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH))] * HEADS)
    attend = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    x = jax.ShapeDtypeStruct((HEADS, LENGTH, SIZE), jnp.bfloat16)
    return jax.grad(lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum(), (0, 1, 2)), (x, x, x)


def _one_document():
    from lcm.types import Context

    positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    return Context(positions, jnp.ones_like(positions), jnp.full_like(positions, -1))


def in_order(found: dict[str, aot.Schedule]) -> list[aot.Schedule]:
    """Forward, dq, then dk and dv, whatever the kernels are called."""
    wanted = ("fwd", "forward"), ("dq", "queries_gradient"), ("dkv", "keys_gradient")
    return [
        next(s for name, s in found.items() if any(word in name for word in words))
        for words in wanted
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="*", default=["v5e:2x2", "v5p:2x2x1"])
    parser.add_argument("--blocks", nargs="*", type=int, default=[512, 1024])
    given = parser.parse_args()
    print("topology   block  kernel    bundles ours  splash  spills ours  splash  mxu ours  splash")
    for topology in given.topologies:
        for block in given.blocks:
            sides = [in_order(aot.schedules(b, block, topology=topology)) for b in (ours, splash)]
            for name, a, b in zip(KERNELS, *sides, strict=True):
                print(
                    f"{topology:9}  {block:5}  {name:8}  {a.bundles:12}  {b.bundles:6}  "
                    f"{a.spills:11}  {b.spills:6}  {a.mxu_use:8.0%}  {b.mxu_use:6.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
