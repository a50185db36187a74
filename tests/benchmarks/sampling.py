"""Milliseconds from logits to a token, beside the processors of transformers, in one run.

    OMP_NUM_THREADS=1 taskset -c 1 python tests/benchmarks/sampling.py [--vocab=49152] [--rows=1,8]

One core each, or two pools of threads disturb one another. A full chain: repetition, no repeated
trigram, temperature, top-k, top-p, min-p, typical, epsilon, eta, and the draw with its two
log-probabilities, after a prompt of 256 tokens. The first decile of 100 calls.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.generation import logits_process as hf

from lcm.decoding import Sampling, begin, chain, keys, observe, plan, sample

FULL = Sampling(
    repetition_penalty=1.2,
    no_repeat_ngram=3,
    temperature=0.8,
    top_k=200,
    top_p=0.95,
    min_p=0.01,
    typical_p=0.95,
    epsilon=1e-4,
    eta=1e-4,
)
CHAINS = {
    "greedy": Sampling(temperature=0),
    "temperature": Sampling(temperature=0.8),
    "top-p": Sampling(temperature=0.8, top_p=0.95),
    "full": FULL,
}


def fastest(calls: list[Callable], rounds: int = 5, block: int = 20) -> list[float]:
    """Milliseconds of each, the first decile: what others on the machine do slows the rest.

    They take turns by blocks of calls, since their threads get in each other's way.
    """
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            call(), call()
            for _ in range(block):
                start = time.perf_counter()
                call()
                found.append(time.perf_counter() - start)
    return [float(np.quantile(found, 0.1)) * 1e3 for found in times]


def ours(request: Sampling, prompts: np.ndarray, logits_RV: np.ndarray) -> Callable:
    settings = [request] * len(prompts)
    shape = plan(settings, logits_RV.shape[1], prompts.shape[1] + 4096)
    rows, active_R = (chain(settings, shape), keys(settings, shape)), jnp.ones(len(prompts), bool)
    logits_RV = jnp.asarray(logits_RV)

    def step(history, logits_RV):
        history, drawn = sample(*rows, history, logits_RV)
        return observe(history, drawn.token_R, active_R), drawn

    run = jax.jit(step, donate_argnums=0)
    box = [begin(settings, list(prompts), shape)]

    def call():
        box[0], drawn = run(box[0], logits_RV)
        return jax.block_until_ready(drawn)

    return call


def theirs(request: Sampling, prompts: np.ndarray, logits_RV: np.ndarray) -> Callable:
    makers = {
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram": hf.NoRepeatNGramLogitsProcessor,
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
        "typical_p": hf.TypicalLogitsWarper,
        "epsilon": hf.EpsilonLogitsWarper,
        "eta": hf.EtaLogitsWarper,
    }
    greedy, default = request.temperature == 0, Sampling()
    changed = [] if greedy else [n for n in makers if getattr(request, n) != getattr(default, n)]
    processors = hf.LogitsProcessorList([makers[name](getattr(request, name)) for name in changed])
    ids, logits = torch.tensor(prompts), torch.tensor(logits_RV)

    def call():
        scores = processors(ids, logits)
        if greedy:
            return torch.argmax(scores, dim=-1)
        return torch.multinomial(scores.softmax(-1), 1)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rows", default="1,8")
    options = parser.parse_args()
    print("chain        rows   lcm ms   transformers ms")
    for name, request in CHAINS.items():
        for rows in map(int, options.rows.split(",")):
            rng = np.random.default_rng(0)
            prompts = rng.integers(0, options.vocab, (rows, 256))
            logits_RV = rng.normal(size=(rows, options.vocab)).astype(np.float32) * 3
            figures = fastest([make(request, prompts, logits_RV) for make in (ours, theirs)])
            print(f"{name:12} {rows:4} {figures[0]:8.2f} {figures[1]:10.2f}", flush=True)


if __name__ == "__main__":
    main()
