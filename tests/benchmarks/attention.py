"""Attention on a CPU beside its peers, and what the host spends on masks.

    pip install torch==2.13.0
    python tests/benchmarks/attention.py run               # 512 .. 16384, 15 minutes on 2 cores
    python tests/benchmarks/attention.py run 2048 --torch=/other/venv/bin/python
    python tests/benchmarks/attention.py masks --lengths 8192 32768 131072

`run`: causal attention of 4 heads of 64, batch 1, float32, forward alone and forward with backward:

    ours, jax, torch    ms; `attend` block by block, jax.nn.dot_product_attention and
                        torch.nn.functional.scaled_dot_product_attention
    w512                ms of ours with a window of 512: twice the length, twice the time
    ratio               of the faster peer's time to ours
    MB                  peak resident memory beyond imports and arguments, compilation included
    dense               MB of our own reference backend, up to 8192

Every figure is a process of its own on the same two cores, sides take turns, printed are medians
over rounds. A side that needs more memory than `--gigabytes` shows as a dash.

`masks`: seconds on the host for a causal window of 4096 in blocks of 512, on rows packed with
documents of 1000 tokens:

    intervals           first and last visible key of each query, compiled before
    tables              these and all else that our kernels prefetch, compiled before
    splash              the tables of jax's splash attention, for one head and without packing,
                        which is not in them; built once, since it keeps them
"""

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

LENGTHS = 512, 1024, 2048, 4096, 8192, 16_384
HEADS, SIZE, WINDOW, THREADS = 4, 64, 512, 2
SIDES = "ours", "jax", "torch", "w512", "dense"
DENSE = 8192  # longest sequence of the reference backend
BLOCK = 512  # side of a tile in the tables of `masks`


def with_jax(side: str, length: int, backward: bool) -> Callable[[], Any]:
    """A function that runs attention once and waits for it."""
    import jax
    import jax.numpy as jnp

    from lcm.ops.attention import Part, attend, causal, window

    mask = causal() & window(WINDOW) if side == "w512" else causal()
    backend = "reference" if side == "dense" else "blockwise"

    def out(q, k, v):
        if side == "jax":
            return jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return attend([Part(q, k, mask)], v, backend=backend)

    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d = (jax.random.normal(key, (1, length, HEADS, SIZE), jnp.float32) for key in keys)

    def both(q, k, v):
        o, pull = jax.vjp(out, q, k, v)
        return o, pull(d)

    compiled = jax.jit(both if backward else out)
    return lambda: jax.block_until_ready(compiled(q, k, v))


def with_torch(length: int, backward: bool) -> Callable[[], Any]:
    """The same in torch, with the arrays as its kernel wants them."""
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    q, k, v, d = (torch.randn(1, HEADS, length, SIZE) for _ in range(4))
    attention = torch.nn.functional.scaled_dot_product_attention

    def forward() -> Any:
        with torch.no_grad():
            return attention(q, k, v, is_causal=True)

    def both() -> Any:
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        attention(*given, is_causal=True).backward(d)
        return [x.grad for x in given]

    return both if backward else forward


def measure(side: str, length: int, backward: bool, seconds: float) -> dict[str, Any]:
    """One side's figures; for a process that has done nothing else."""
    with contextlib.suppress(AttributeError):  # not on macOS
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    run = with_torch(length, backward) if side == "torch" else with_jax(side, length, backward)
    before = _resident("VmRSS")
    run()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return {
        "side": side,
        "length": length,
        "backward": backward,
        "ms": 1000 * statistics.median(times),
        "mb": _resident("VmHWM") - before,
        "load": os.getloadavg()[0],
    }


def _resident(field: str) -> float:
    """MB resident now (VmRSS) or at the peak so far (VmHWM), from the kernel's own count."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) / 1024


def compare(length: int, backward: bool, given: argparse.Namespace, log: Any) -> str:
    """A row of the table: every side in turn, `rounds` times."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(given.rounds):
        for side in SIDES if length <= DENSE else SIDES[:-1]:
            python = given.torch if side == "torch" else sys.executable
            command = [python, __file__, "run", str(length), f"--side={side}"]
            command += [
                f"--seconds={given.seconds}",
                f"--gigabytes={given.gigabytes}",
                *(["--backward"] if backward else []),
            ]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                print(side, length, done.stderr.strip().splitlines()[-1][:200], file=sys.stderr)
                continue
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            log.write(done.stdout.splitlines()[-1] + "\n")
            log.flush()

    def median(side: str, key: str) -> float:
        return statistics.median([m[key] for m in found[side]] or [float("nan")])

    def cell(value: float, width: int, form: str) -> str:
        return f"{'-' if value != value else format(value, form):>{width}}"

    ms = {side: median(side, "ms") for side in SIDES}
    peer = min((ms[side] for side in ("jax", "torch") if ms[side] == ms[side]), default=ms["dense"])
    cells = [f"{length:6}", f"{'both' if backward else 'fwd':>4}"]
    cells += [cell(ms[side], 8, ".1f") for side in SIDES[:4]]
    cells += [cell(peer / ms["ours"], 5, ".2f")]
    cells += [cell(median(side, "mb"), 6, ".0f") for side in SIDES]
    return "  ".join([*cells, f"{max(m['load'] for ms in found.values() for m in ms):4.1f}"])


HEADER = (
    "length        ms ours      jax     torch      w512  ratio  MB ours  jax   torch    w512"
    "   dense  load"
)


def run(given: argparse.Namespace) -> None:
    """The table of times and memory."""
    with open(given.json, "a") as log:
        print(HEADER)
        for backward in (False, True):
            for length in given.lengths or LENGTHS:
                print(compare(length, backward, given, log), flush=True)


def masks(given: argparse.Namespace) -> None:
    """The table of what the host spends before a kernel starts."""
    print(" length  intervals    tables    splash")
    for length in given.lengths or (8192, 32_768):
        compiled = intervals(length), tables(length)
        cells = [f"{_seconds(intervals, length):9.4f}"]
        cells += [f"{_seconds(tables, length):8.4f}" if compiled[1] else f"{'-':>8}"]
        cells += [f"{_seconds(splash, length):8.2f}"]
        print("  ".join([f"{length:7}", *cells]), flush=True)


def _seconds(task: Callable[[int], Any], length: int) -> float:
    start = time.perf_counter()
    task(length)
    return time.perf_counter() - start


def _packed(length: int) -> Any:
    """Documents of 1000 tokens in one row."""
    import numpy as np

    from lcm.types import Context

    at = np.arange(length, dtype=np.int32)[None]
    return Context(at % 1000, at // 1000 + 1, np.full_like(at, -1))


def intervals(length: int) -> None:
    """First and last visible key position of every query."""
    import jax

    from lcm.ops.attention import causal, window

    jax.block_until_ready((causal() & window(4096)).interval(_packed(length).positions_BL))


def tables(length: int) -> bool:
    """All that the kernels prefetch, if this checkout has them."""
    if importlib.util.find_spec("lcm.ops.attention.pallas") is None:
        return False
    import jax
    import jax.numpy as jnp

    from lcm.ops.attention import causal, window
    from lcm.ops.attention.pallas import tiles

    where = _packed(length)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -length % BLOCK)))  # noqa: E731
    lower, upper = (causal() & window(4096)).interval(where.positions_BL)
    known = pad(where.segments_BL), pad(where.positions_BL)
    queries = jnp.stack([*known, pad(lower), pad(upper)], 1)
    kinds = tiles.kinds(queries, jnp.stack(known, 1), ((2, 3),), BLOCK, BLOCK)
    jax.block_until_ready(tiles.tiles(*kinds))
    return True


def splash(length: int) -> None:
    """The tables of jax's splash attention for the forward pass and the gradient of keys."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask,
        splash_attention_mask_info,
    )

    mask = splash_attention_mask.LocalMask((length, length), (4095, 0), 0)
    many = splash_attention_mask.MultiHeadMask([mask])
    splash_attention_mask_info.process_mask(many, (BLOCK, BLOCK))
    splash_attention_mask_info.process_mask_dkv(many, (BLOCK, BLOCK))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="time and memory beside jax and torch")
    runs.add_argument("lengths", nargs="*", type=int)
    runs.add_argument("--rounds", type=int, default=3)
    runs.add_argument("--seconds", type=float, default=1.0, help="of runs, a measurement")
    runs.add_argument("--gigabytes", type=int, default=16, help="a process may have")
    runs.add_argument("--torch", default=sys.executable, help="a Python that has torch")
    runs.add_argument("--json", default=os.devnull, help="file for one line per measurement")
    runs.add_argument("--side", choices=SIDES, help="measure one side in this process")
    runs.add_argument("--backward", action="store_true", help="of one side, with its gradient")
    runs.set_defaults(command=run)
    hosts = commands.add_parser("masks", help="time to build masks on the host")
    hosts.add_argument("--lengths", nargs="*", type=int)
    hosts.set_defaults(command=masks)
    given = parser.parse_args()
    if getattr(given, "side", None):
        (length,) = given.lengths
        resource.setrlimit(resource.RLIMIT_AS, (given.gigabytes << 30, given.gigabytes << 30))
        print(json.dumps(measure(given.side, length, given.backward, given.seconds)))
        return
    given.command(given)


if __name__ == "__main__":
    main()
