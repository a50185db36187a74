"""Recurrences beside attention on a CPU, and what SSD needs on a TPU.

    python tests/benchmarks/recurrence.py                        # 1K, 4K, 16K
    python tests/benchmarks/recurrence.py --peer 4096            # a layer beside transformers' own
    python tests/benchmarks/recurrence.py --aot v5e:2x2 4096     # compiled, not run

Microseconds per token, batch 1, float32, 4 heads of 64 and a state of 64: `fwd` forward alone,
`both` forward with the gradients of all arguments. Linear in length is the same number in each row;
`growth` is the time at a length to that at the one before, by the ratio of lengths. The fastest of
runs in one process, sides in turn. `--peer` is a Mamba-2 mixer of width 256, forward.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lcm.ops.attention import Part, attend, causal, window
from lcm.ops.recurrence import op_diag, op_matrix

HEADS, SIZE, STATE = 4, 64, 64


def ssd(q: Any, k: Any, v: Any, l: Any) -> Any:
    return op_matrix(q, k, v, l)[0]


def delta(q: Any, k: Any, v: Any, l: Any) -> Any:
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    return op_matrix(q, k, v, l, (k, -0.5 * k))[0]


def diagonal(q: Any, k: Any, v: Any, l: Any) -> Any:
    return op_diag(jax.nn.sigmoid(k), v)[0]


def attention(*masks: Any) -> Callable[..., Any]:
    mask = causal()
    for other in masks:
        mask = mask & other
    return lambda q, k, v, l: attend([Part(q, k, mask)], v, backend="blockwise")


SIDES: dict[str, Callable[..., Any]] = {
    "ssd": ssd,
    "delta rule": delta,
    "diagonal": diagonal,
    "window 512": attention(window(512)),
    "attention": attention(),
}


def arguments(length: int, heads: int = HEADS, state: int = STATE) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(1, length, heads, state)] * 2 + [(1, length, heads, SIZE), (1, length, heads)]
    q, k, v, l = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return [q, k, v, -0.1 * jnp.abs(l)]


def prepared(function: Callable[..., Any], length: int, backward: bool) -> Callable[[], Any]:
    """A function that runs one side once and waits for it, compiled."""
    given = arguments(length)

    def both(*given: Any) -> Any:
        y, pull = jax.vjp(function, *given)
        return y, pull(given[2])

    compiled = jax.jit(both if backward else function)
    run = lambda: jax.block_until_ready(compiled(*given))  # noqa: E731
    run()
    return run


def fastest(sides: list[Callable[[], Any]], runs: int) -> list[float]:
    """Seconds of sides that take turns."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(runs):
        for run, found in zip(sides, times, strict=True):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return [min(found) for found in times]


def table(lengths: list[int], runs: int) -> None:
    for title, backward in (("fwd", False), ("both", True)):
        before: tuple[int, list[float]] | None = None
        for length in lengths:
            sides = [prepared(function, length, backward) for function in SIDES.values()]
            found = fastest(sides, runs)
            cells = []
            for at, (name, seconds) in enumerate(zip(SIDES, found, strict=True)):
                growth = ""
                if before is not None:
                    grown = seconds / before[1][at] * before[0] / length
                    growth = f" (growth {grown:.2f})"
                cells.append(f"{name} {1e6 * seconds / length:7.2f}{growth}")
            print(f"{title:>4} {length:>6}: " + ", ".join(cells), flush=True)
            before = length, found


def peer(length: int, runs: int) -> None:
    """A Mamba-2 mixer, ours and that of transformers, with the same sizes."""
    import torch
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    from lcm import config, models
    from lcm.models.decoder import block

    torch.set_num_threads(os.cpu_count() or 1)
    sizes = {"hidden_size": 256, "state_size": STATE, "num_heads": 8, "head_dim": SIZE}
    theirs = Mamba2Mixer(Mamba2Config(**sizes, n_groups=1, chunk_size=256), 0).eval()
    x = torch.randn(1, length, 256)

    def run_theirs() -> None:
        with torch.no_grad():
            theirs(x)

    keys = ["width=256", "heads=8", f"state={STATE}", "pattern=mamba2", "mlp=none", "depth=1"]
    cfg = config.override(config.base(), [f"model.{key}" for key in keys])
    layer = block(models.spec(cfg).layers[0])
    params, at = layer.init(jax.random.key(0)), models.default_context((1, length))
    ours = jax.jit(lambda params, x: layer.apply(params, x, at, None, {})[0])
    x_BLD = jnp.asarray(x.numpy())
    run_ours = lambda: jax.block_until_ready(ours(params, x_BLD))  # noqa: E731
    run_ours()
    run_theirs()
    mine, other = fastest([run_ours, run_theirs], runs)
    print(f"{length} tokens: {1e3 * mine:.1f} ms, transformers {1e3 * other:.1f} ms")
    print(f"{other / mine:.1f} times as fast")


def ahead(length: int, topology: str) -> None:
    """24 heads of 64 with a state of 128 that they share, forward and backward."""
    from lcm import aot

    shapes = [(1, length, 1, 128)] * 2 + [(1, length, 24, 64), (1, length, 24)]
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def both(*given: Any) -> Any:
        y, pull = jax.vjp(ssd, *given)
        return y, pull(given[2])

    program = aot.compile(both, *given, topology=topology)
    told = program.compiled.cost_analysis()
    print(
        f"{topology} {length}: temporaries {program.temporaries / 2**20:.0f} MiB, "
        f"{told['flops'] / 1e9:.1f} GFLOP and {told.get('bytes accessed', 0) / 2**20:.0f} MiB by "
        f"XLA's count (a loop once), {program.seconds:.1f} s to compile"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lengths", nargs="*", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--aot", default="")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for length in args.lengths if args.peer or args.aot else ():
        if args.aot:
            ahead(length, args.aot)
        else:
            peer(length, args.runs)
    if not (args.peer or args.aot):
        table(args.lengths, args.runs)


if __name__ == "__main__":
    main()
