"""LSSAR attention block by block on a CPU beside softmax attention.

    python tests/benchmarks/softplus.py                    # 2048 and 8192, 2 minutes on 2 cores

Causal, 4 heads of 64, batch 1, float32, both by the blockwise backend; `fwd` forward alone, `both`
forward with the gradients of queries, keys and values. Milliseconds are medians over runs in one
process, sides in turn; `ratio` is LSSAR's time to softmax's. LSSAR needs the sum of a row before
any of its powers, and the largest power before their sum, so it meets each key more often.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lcm.ops.attention import Part, Softmax, Softplus, attend
from lcm.ops.attention.normaliser import Normaliser

HEADS, SIZE = 4, 64


def side(normaliser: Normaliser, length: int, backward: bool) -> Callable[[], Any]:
    """A function that runs attention once and waits for it, compiled."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d = (jax.random.normal(key, (1, length, HEADS, SIZE), jnp.float32) for key in keys)

    def out(q, k, v):
        return attend([Part(q, k)], v, normaliser=normaliser, backend="blockwise")

    def both(q, k, v):
        o, pull = jax.vjp(out, q, k, v)
        return o, pull(d)

    compiled = jax.jit(both if backward else out)
    run = lambda: jax.block_until_ready(compiled(q, k, v))  # noqa: E731
    run()
    return run


def milliseconds(sides: list[Callable[[], Any]], runs: int) -> list[float]:
    """Medians of sides that take turns."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(runs):
        for run, found in zip(sides, times, strict=True):
            start = time.perf_counter()
            run()
            found.append(1000 * (time.perf_counter() - start))
    return [statistics.median(found) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lengths", nargs="*", type=int, default=[2048, 8192])
    parser.add_argument("--power", type=float, default=15.0)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    print("length        softmax ms  LSSAR ms  ratio  load")
    for length in given.lengths:
        for backward in (False, True):
            sides = [side(n, length, backward) for n in (Softmax(), Softplus(given.power))]
            softmax, lssar = milliseconds(sides, given.runs)
            print(
                f"{length:6}  {'both' if backward else 'fwd':>4}  {softmax:10.1f}  {lssar:8.1f}  "
                f"{lssar / softmax:5.1f}  {os.getloadavg()[0]:4.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
