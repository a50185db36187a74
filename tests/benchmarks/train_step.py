"""Speed and memory of our train step beside the same Llama in `transformers`, on a CPU.

    pip install torch==2.13.0 transformers
    python tests/benchmarks/train_step.py                  # all rows, 20 minutes on 2 cores
    python tests/benchmarks/train_step.py 128x256 --rounds=1 --seconds=3

One step is forward, backward, clipping to norm 1 and AdamW, in float32. Both sides have the same
batch and the same shape: 4 layers, heads of 32 or 64, SwiGLU, RMSNorm, RoPE, 320 tied embeddings.
Each measurement is a process of its own on the same two cores; sides take turns (ours, eager, sdpa,
ours, ...), so that a slow minute of the machine hits all of them. All have their memory in large
pages, as the Makefile sets it (GLIBC_TUNABLES= turns that off: ours loses a fifth, theirs little).
Printed are medians over rounds:

    ours, eager, sdpa   thousand tokens/s; eager and sdpa are the two attentions of transformers
    ratio               ours over the faster of the two
    cpu ratio           the same by tokens per second of CPU time, which other work on the machine
                        disturbs less; the waiting of torch's threads for each other counts in it
    MB ours, theirs     peak resident memory, compilation included, against the faster attention
    + ours, theirs      the part of it that came after the imports
    compile             seconds to the end of our first step
    load                largest load average seen; above 2 the machine is not ours and rows mislead

Every measurement also goes to `--json` as one line.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

SIDES = ("ours", "eager", "sdpa")
VOCAB, DEPTH, THREADS = 320, 4, 2


class Case(NamedTuple):
    """A shape: 4096 tokens a step at every length."""

    width: int
    length: int

    @property
    def batch(self) -> int:
        return 4096 // self.length

    @property
    def heads(self) -> int:
        return self.width // (32 if self.width < 256 else 64)

    @property
    def hidden(self) -> int:
        """8/3 of the width, rounded up to 64, as `config.model.hidden = 0` takes it."""
        return -(-8 * self.width // 192) * 64


CASES = tuple(Case(width, length) for width in (128, 256, 512) for length in (256, 512))


def ours(case: Case) -> Callable[[], float]:
    """Our step as a function that runs it once and returns the loss."""
    import jax
    import jax.numpy as jnp

    from lcm import config, models, training
    from lcm.types import Batch

    cfg = config.base()
    cfg.model.update(width=case.width, depth=DEPTH, heads=case.heads, hidden=case.hidden)
    cfg.model.vocab, cfg.data.length, cfg.train.batch = VOCAB, case.length, case.batch
    spec, rule = models.spec(cfg), training.optimizer(cfg.train)
    state = jax.jit(lambda key: training.init_state(spec, rule, key, 0.0))(jax.random.key(0))
    shape = (case.batch, case.length)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, VOCAB)
    targets = jnp.roll(tokens, -1, axis=1)
    batch = Batch(tokens, targets, models.default_context(shape), jnp.ones(shape))
    compiled = jax.jit(training.make_step(spec, rule, cfg), donate_argnums=0)

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return run


def theirs(case: Case, attention: str) -> Callable[[], float]:
    """The step of `transformers` and torch, with the fastest optimiser that torch has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    cfg = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=case.width,
        intermediate_size=case.hidden,
        num_hidden_layers=DEPTH,
        num_attention_heads=case.heads,
        max_position_embeddings=case.length,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(cfg).train()
    rule = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens = torch.randint(0, VOCAB, (case.batch, case.length))

    def run() -> float:
        rule.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        return loss.item()

    return run


def measure(side: str, case: Case, seconds: float) -> dict[str, Any]:
    """One side's figures; for a process that has done nothing else."""
    with contextlib.suppress(AttributeError):  # not on macOS
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    _imports(side)
    before = _resident("VmRSS")
    start = time.perf_counter()
    run = ours(case) if side == "ours" else theirs(case, side)
    first_loss = run()
    first = time.perf_counter() - start
    whole = _resident("VmHWM")
    for _ in range(2):
        run()
    _reset_peak()
    times: list[float] = []
    cpu = time.process_time()
    while sum(times) < seconds or len(times) < 5:
        start = time.perf_counter()
        loss = run()
        times.append(time.perf_counter() - start)
    cpu = (time.process_time() - cpu) / len(times)
    steps = _resident("VmHWM")
    return {
        "side": side,
        **case._asdict(),
        "batch": case.batch,
        "tokens_per_second": case.batch * case.length / statistics.median(times),
        "tokens_per_second_best": case.batch * case.length / min(times),
        "tokens_per_cpu_second": case.batch * case.length / cpu,
        "load": os.getloadavg()[0],
        "steps": len(times),
        "first_step_seconds": first,
        "peak_mb": max(whole, steps),
        "beyond_imports_mb": max(whole, steps) - before,
        "imports_mb": before,
        "losses": [first_loss, loss],
    }


def _imports(side: str) -> None:
    if side == "ours":
        import jax

        import lcm.training  # noqa: F401

        jax.devices()
    else:
        import torch
        from transformers import LlamaForCausalLM  # noqa: F401

        torch.zeros(1)


def _resident(field: str) -> float:
    """MB resident now (VmRSS) or at the peak so far (VmHWM), from the kernel's own count."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) / 1024


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")


def compare(case: Case, rounds: int, seconds: float, log: Any) -> str:
    """A row of the table: every side in turn, `rounds` times."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    env = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}
    for _ in range(rounds):
        for side in SIDES:
            command = [sys.executable, __file__, f"{case.width}x{case.length}"]
            command += [f"--side={side}", f"--seconds={seconds}"]
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
            line = ran.stdout.splitlines()[-1]
            found[side].append(json.loads(line))
            log.write(line + "\n")
            log.flush()

    def median(side: str, key: str) -> float:
        return statistics.median(m[key] for m in found[side])

    speed = {side: median(side, "tokens_per_second") for side in SIDES}
    peer = max(SIDES[1:], key=speed.__getitem__)
    cpu = [median(side, "tokens_per_cpu_second") for side in ("ours", peer)]
    cells = [f"{case.width:5}", f"{case.length:6}", f"{case.batch:5}"]
    cells += [f"{speed[side] / 1000:6.2f}" for side in SIDES]
    cells += [f"{speed['ours'] / speed[peer]:5.2f}", f"{cpu[0] / cpu[1]:9.2f}"]
    for key in ("peak_mb", "beyond_imports_mb"):
        cells += [f"{median(side, key):7.0f}" for side in ("ours", peer)]
    cells += [f"{median('ours', 'first_step_seconds'):7.1f}"]
    return "  ".join([*cells, f"{max(m['load'] for m in found['ours'] + found[peer]):4.1f}"])


HEADER = (
    "width  length  batch    ours   eager    sdpa  ratio  cpu ratio  MB ours   theirs"
    "  +  ours   theirs  compile  load"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="WIDTHxLENGTH; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of steps, a measurement")
    parser.add_argument("--json", default=os.devnull, help="file for one line per measurement")
    parser.add_argument("--side", choices=SIDES, help="measure one side in this process")
    given = parser.parse_args()
    cases = [Case(*map(int, text.split("x"))) for text in given.cases] or CASES
    if given.side:
        print(json.dumps(measure(given.side, cases[0], given.seconds)))
        return
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        print("skipped: the peer is missing, `pip install torch==2.13.0 transformers`")
        return
    print(HEADER)
    with open(given.json, "a") as log:
        for case in cases:
            print(compare(case, given.rounds, given.seconds, log), flush=True)


if __name__ == "__main__":
    main()
