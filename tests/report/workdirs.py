"""Made-up runs with plausible curves, written as training and evaluation write theirs."""

import json
from pathlib import Path

import numpy as np

from lcm.evaluation.documents import from_text_tokens
from lcm.evaluation.perplexity import evaluate
from lcm.evaluation.results import save

TRAIN_LENGTH = 64


def held_out(count=24, size=900):
    rng = np.random.default_rng(0)
    return [
        from_text_tokens(
            f"module_{i}.py",
            np.clip(rng.normal(90 + 2 * i, 25, size + 7 * i), 0, 255).astype(int),
            bos=256,
            eos=257,
            text_bytes=size + 7 * i,
        )
        for i in range(count)
    ]


def scorer(climb, train_length=TRAIN_LENGTH):
    """Loss that falls with context and, past the training length, climbs by up to `climb`."""

    def score(batch):
        position = batch.context.positions_BL
        base = 1.25 + 2.2 / np.sqrt(position + 1)
        past = np.maximum(0, position - train_length) / train_length
        return (base + climb * (1 - np.exp(-past))) * (0.4 + batch.targets_BL / 180)

    return score


def make(
    folder,
    *,
    climb=0.0,
    steps=400,
    evaluated=True,
    encoding="rope",
    tokenizer="bytes",
    **evaluation,
) -> Path:
    """Write config.json, metrics.jsonl and, if wanted, eval/length.json."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = {"model": {"depth": 4, "positions": encoding}, "optimizer": {"lr": 3e-3}}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng([*encoding.encode()])
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            loss = 1.7 + 3.8 * np.exp(-step / 60) + 0.3 / np.sqrt(step) + rng.normal(0, 0.06)
            row = {
                "step": step,
                "loss": loss,
                "lr": 3e-3 * min(1, step / 50),
                "grad_norm": float(np.exp(rng.normal(-0.5, 0.25) + 2 * np.exp(-step / 40))),
                "tokens_per_second": 20_000 + rng.normal(0, 500),
            }
            if step % 100 == 0:
                row["loss_by_position"] = [loss + 1 / (i + 1) for i in range(16)]
            file.write(json.dumps(row) + "\n")
    if evaluated:
        about = {"parameters": 812_544, "tokenizer": tokenizer, "step": steps}
        settings = {"train_length": TRAIN_LENGTH, "replicates": 500, "batch_tokens": 4096}
        settings |= evaluation
        result = evaluate(
            scorer(climb, settings["train_length"]),
            settings.pop("documents", None) or held_out(),
            about=about,
            **settings,
        )
        save(result, folder / "eval" / "length.json")
    return folder
