"""Recurrences beside attention on a CPU, and what SSD needs on a TPU.

    python tests/benchmarks/recurrence.py 1024 2048 4096 8192 16384 32768 65536
    python tests/benchmarks/recurrence.py --peer 4096            # layers beside transformers' own
    python tests/benchmarks/recurrence.py --aot v5e:2x2 4096     # compiled, not run

Microseconds per token and KiB of temporaries per token, float32, 4 heads of 64 and a state of 64:
`fwd` forward alone, `both` forward with the gradients of all arguments. Each length has as many
rows as make `--tokens`, 65,536, since one row of 1,024 tokens lies in a CPU's caches and one of
65,536 does not, which has nothing to do with what is computed; `--tokens 0` has one row at any
length. `growth` is the time of a row at a length to that at half of it, so 2 is linear: recurrences
fail above 2.2. Where attention first takes longer than a recurrence is said at the end. The fastest
of runs in one process, sides in turn, those above five seconds once. `--peer` are mixers of width
256, forward: Mamba-2, and Mamba with a state of 16; and their projections alone, which both sides
have to do.
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
LONG = 5.0  # seconds


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
RECURRENCES = "ssd", "delta rule", "diagonal"


def arguments(rows: int, length: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, length, HEADS, each) for each in (STATE, STATE, SIZE)] + [
        (rows, length, HEADS)
    ]
    q, k, v, l = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return [q, k, v, -0.1 * jnp.abs(l)]


def prepared(
    function: Callable[..., Any], rows: int, length: int, backward: bool
) -> tuple[Callable[[], Any], float]:
    """A function that runs one side once and waits for it, compiled, and its bytes for a token."""
    given = arguments(rows, length)

    def both(*given: Any) -> Any:
        y, pull = jax.vjp(function, *given)
        return y, pull(given[2])

    compiled = jax.jit(both if backward else function).lower(*given).compile()
    run = lambda: jax.block_until_ready(compiled(*given))  # noqa: E731
    run()
    return run, compiled.memory_analysis().temp_size_in_bytes / (rows * length)


def fastest(sides: list[Callable[[], Any]], runs: int) -> list[float]:
    """Seconds of sides that take turns."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(runs):
        for run, found in zip(sides, times, strict=True):
            if found and found[0] > LONG:
                continue
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return [min(found) for found in times]


def table(lengths: list[int], runs: int, tokens: int) -> None:
    for title, backward in (("fwd", False), ("both", True)):
        found: dict[int, list[float]] = {}
        for length in lengths:
            rows = max(tokens // length, 1)
            sides = [prepared(function, rows, length, backward) for function in SIDES.values()]
            times = fastest([run for run, _ in sides], runs)
            found[length] = [seconds / rows for seconds in times]
            cells = []
            for name, seconds, (_, size) in zip(SIDES, found[length], sides, strict=True):
                cell = f"{name} {1e6 * seconds / length:7.2f} us {size / 1024:6.2f} KiB"
                if length // 2 in found:
                    growth = seconds / found[length // 2][list(SIDES).index(name)]
                    steep = " TOO STEEP" if growth > 2.2 and name in RECURRENCES else ""
                    cell += f" (growth {growth:.2f}{steep})"
                cells.append(cell)
            print(f"{title:>4} {length:>6}: " + ", ".join(cells), flush=True)
        for name in RECURRENCES:
            at, attention = list(SIDES).index(name), list(SIDES).index("attention")
            slower = [n for n in lengths if found[n][attention] > found[n][at]]
            print(f"{title:>4}: attention takes longer than {name} from {slower[:1] or 'nowhere'}")


def peer(length: int, runs: int) -> None:
    """A Mamba-2 and a Mamba mixer, ours and those of transformers, with the same sizes."""
    import torch
    from transformers import Mamba2Config, MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.set_num_threads(os.cpu_count() or 1)
    sizes = {"state_size": STATE, "num_heads": 8, "head_dim": SIZE, "chunk_size": 256}
    kinds = {
        "mamba2": Mamba2Mixer(Mamba2Config(hidden_size=256, n_groups=1, **sizes), 0),
        "mamba1": MambaMixer(MambaConfig(hidden_size=256, state_size=16), 0),
    }
    for name, theirs in kinds.items():
        x = torch.randn(1, length, 256)
        theirs.eval()

        def read(theirs: Any = theirs, x: Any = x) -> None:
            with torch.no_grad():
                theirs(x)

        def learn(theirs: Any = theirs, x: Any = x) -> None:
            theirs.zero_grad()
            (theirs(x) ** 2).sum().backward()

        run_read, run_learn = mixer(name, STATE if name == "mamba2" else 16, jnp.asarray(x.numpy()))
        pairs = [("forward", run_read, read), ("forward and backward", run_learn, learn)]
        if name == "mamba1":  # whose gradient takes minutes there: one of all tokens for each slice
            mine = fastest([run_learn], runs)[0]
            print(f"{name}, {length} tokens, forward and backward: {1e3 * mine:.1f} ms")
            pairs.pop()
        for what, run_ours, run_theirs in pairs:
            run_theirs()
            mine, other = fastest([run_ours, run_theirs], runs)
            print(
                f"{name}, {length} tokens, {what}: {1e3 * mine:.1f} ms, transformers "
                f"{1e3 * other:.1f} ms, {other / mine:.1f} times as fast",
                flush=True,
            )
        projections([each.weight.detach() for each in (theirs.in_proj, theirs.out_proj)], length)


def projections(weights: list[Any], length: int) -> None:
    """Times of `[L, D]` by the matrices `[E, D]` of a mixer, by XLA and by PyTorch."""
    import torch

    there = [(torch.randn(length, w.shape[1]), w.T) for w in weights]
    here = [[jnp.asarray(each.numpy()) for each in pair] for pair in there]
    product = jax.jit(lambda pairs: [x @ w for x, w in pairs])
    run_ours = lambda: jax.block_until_ready(product(here))  # noqa: E731
    run_ours()
    ours, theirs = fastest([run_ours, lambda: [x @ w for x, w in there]], 20)
    print(
        f"  its projections alone: {1e3 * ours:.1f} ms, PyTorch {1e3 * theirs:.1f} ms", flush=True
    )


def mixer(name: str, state: int, x_BLD: jax.Array) -> list[Callable[[], Any]]:
    """Functions that run one of our mixers once and wait for it, compiled: its outputs, and the
    gradients of its parameters."""
    from lcm import config, models
    from lcm.models.decoder import block

    keys = ["width=256", "heads=8", f"state={state}", f"pattern={name}", "mlp=none", "depth=1"]
    cfg = config.override(config.base(), [f"model.{key}" for key in keys])
    layer = block(models.spec(cfg).layers[0])
    params, at = layer.init(jax.random.key(0)), models.default_context(x_BLD.shape[:2])
    read = lambda params, x: layer.apply(params, x, at, None, {})[0]  # noqa: E731
    learn = jax.grad(lambda params, x: (read(params, x) ** 2).sum())
    runs = []
    for ours in map(jax.jit, (read, learn)):
        runs.append(lambda ours=ours: jax.block_until_ready(ours(params, x_BLD)))
        runs[-1]()
    return runs


def ahead(length: int, topology: str) -> None:
    """24 heads of 64 with a state of 128 that they share, forward and backward."""
    from lcm import aot

    shapes = [(1, length, 1, 128)] * 2 + [(1, length, 24, 64), (1, length, 24)]
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def both(*given: Any) -> Any:
        y, pull = jax.vjp(ssd, *given)
        return y, pull(given[2])

    program = aot.compile(both, *given, topology=topology)
    told, used = program.compiled.cost_analysis(), program.compiled.memory_analysis()
    print(
        f"{topology} {length}: temporaries {used.temp_size_in_bytes / 2**20:.0f} MiB, "
        f"{told['flops'] / 1e9:.1f} GFLOP and {told.get('bytes accessed', 0) / 2**20:.0f} MiB by "
        f"XLA's count (a loop once), {program.seconds:.1f} s to compile"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lengths", nargs="*", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=65536)
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
        table(args.lengths, args.runs, args.tokens)


if __name__ == "__main__":
    main()
