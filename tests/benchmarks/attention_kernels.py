"""Schedules of our TPU attention kernels beside splash attention, jax's and tokamax's.

No TPU is needed:

    pip install 'jax[tpu]'
    JAX_PLATFORMS=cpu python tests/benchmarks/attention_kernels.py          # v5e and v5p, 2 minutes
    ... --topologies v6e:2x2 tpu7x:2x2x1 --tiles 512x1024 1024x512 --sides ours

tokamax needs Python 3.12 and brings a later jax, and libtpu, with it: its figures are to be held
against ours of the same environment,

    python3.12 -m venv VENV && VENV/bin/pip install 'jax[tpu]' tokamax
    PYTHONPATH=. VENV/bin/python tests/benchmarks/attention_kernels.py --sides ours tokamax

Causal, 8 heads of 128, bfloat16, 4096 tokens. A bundle is a cycle; branches are all counted once
and loops not multiplied, so figures of one tile compare with each other:

    bundles, spills     of the whole kernel. Ours and tokamax's have two bodies, one for tiles that
                        are visible throughout and one for tiles that a mask cuts, and a tile runs
                        one of them. jax's has one, which masks.
    per 1000 pairs      bundles of a body, for 1000 pairs of a query and a key in its tile
    mxu                 share of matrix slots in use

What was chosen by them: `plan.LARGEST`, 1024 x 1024 for every kernel and generation. Bundles per
1000 pairs, measured with 2 heads and jax 0.10.2, libtpu 0.0.42.1:

    queries x keys        512x512   1024x512   512x1024   1024x1024
    v5e    forward          6.88       6.43       4.94       4.61
           dq               6.69       6.49       5.82       5.71
           dk, dv           8.23       7.61       8.13       7.53
    v5p    forward          7.22       6.63       5.08       4.72
           dq               6.92       6.68       5.91       5.85
           dk, dv           8.44       7.67       8.12       7.52
    v6e    forward          5.44       4.73       3.85       3.33
           dq               4.74       4.08       3.98       3.64
           dk, dv           5.43       4.80       4.86       4.52
    tpu7x  forward          5.40       4.93       3.92       3.42
           dq               4.58       3.93       3.81       3.60
           dk, dv           5.31       4.78       4.80       4.50

Larger tiles compute more of what a causal mask hides: at 4096 tokens 1024 x 1024 has 11 % more
pairs than 512 x 512, which every kernel wins back but dk, dv on v5e, short of it by 1.7 %; at
32,768 tokens it is 1.5 %.

tokamax 0.0.17 beside ours on v5e, jax 0.12.0.1, libtpu 0.0.50.1, bundles per 1000 pairs:

    queries x keys                     512x512           1024x1024
                                    ours  tokamax       ours  tokamax
    forward                         7.11     6.22       4.64     5.18
    dq, and dk, dv                 15.15     9.90      13.31     9.20

Its backward pass is one kernel of five matmuls a tile, ours are two of seven together; the price,
not in these figures, is that it writes parts of dq for each block of keys and sums them after.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lcm import aot

LENGTH, HEADS, SIZE = 4096, 8, 128
KERNELS = "forward", "dq", "dk, dv"


def ours(queries: int, keys: int) -> tuple:
    """The gradient of our attention with such tiles."""
    from lcm.ops.attention import Part, pallas
    from lcm.ops.attention.pallas import plan

    plan.LARGEST = queries, keys
    x = jax.ShapeDtypeStruct((1, LENGTH, HEADS, SIZE), jnp.bfloat16)
    where = _one_document()

    def loss(q, k, v):
        return pallas.attend((Part(q, k),), v, where, where, 1.0).out_BLHK.astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2)), (x, x, x)


def splash(queries: int, keys: int) -> tuple:
    """The gradient of jax's attention with the same tiles, in kernels for dq and for dk, dv."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    sizes = kernel.BlockSizes(**_sizes(queries, keys), block_q_dq=queries, block_kv_dq=keys)
    mask = masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH))] * HEADS)
    return _of(kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1))


def tokamax(queries: int, keys: int) -> tuple:
    """The gradient of tokamax's splash attention, whose backward pass is one kernel."""
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    sizes = kernel.SplashConfig(**_sizes(queries, keys))
    return _of(
        kernel.make_splash_mha(masks.CausalMask((LENGTH, LENGTH)), config=sizes, q_seq_shards=1)
    )


def _sizes(queries: int, keys: int) -> dict[str, int]:
    of_queries = dict.fromkeys(("block_q", "block_q_dkv"), queries)
    names = "block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute"
    return of_queries | dict.fromkeys(names, keys)


def _of(attend: Callable) -> tuple:
    x = jax.ShapeDtypeStruct((HEADS, LENGTH, SIZE), jnp.bfloat16)
    return jax.grad(lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum(), (0, 1, 2)), (x, x, x)


def _one_document():
    from lcm.types import Context

    positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    return Context(positions, jnp.ones_like(positions), jnp.full_like(positions, -1))


def by_kernel(found: dict[str, aot.Schedule]) -> dict[str, aot.Schedule]:
    """Schedules by the names in `KERNELS`, whatever the kernels are called."""
    words = ("fwd", "forward"), ("dq", "queries_gradient"), ("dkv", "keys_gradient")
    return {
        name: schedule
        for name, some in zip(KERNELS, words, strict=True)
        for kernel, schedule in found.items()
        if any(word in kernel for word in some)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="*", default=["v5e:2x2", "v5p:2x2x1"])
    parser.add_argument("--tiles", nargs="*", default=["512x512", "1024x1024"])
    parser.add_argument("--sides", nargs="*", choices=[*SIDES], default=["ours", "splash"])
    given = parser.parse_args()
    print("topology     tile       kernel    whose     bundles  per 1000 pairs  spills   mxu")
    for topology in given.topologies:
        for tile in given.tiles:
            queries, keys = map(int, tile.split("x"))
            for side in given.sides:
                found = aot.schedules(SIDES[side], queries, keys, topology=topology)
                for name, s in by_kernel(found).items():
                    a_pair = 1000 * s.bundles / (queries * keys * BODIES[side])
                    print(
                        f"{topology:11}  {tile:9}  {name:8}  {side:8}  {s.bundles:7}  "
                        f"{a_pair:14.2f}  {s.spills:6}  {s.mxu_use:4.0%}",
                        flush=True,
                    )


SIDES = {"ours": ours, "splash": splash, "tokamax": tokamax}
BODIES = {"ours": 2, "splash": 1, "tokamax": 2}

if __name__ == "__main__":
    main()
