"""SmolLM2-135M itself, written as a folder and read by transformers: the same texts."""

import numpy as np
import pytest

import lcm
from lcm.decoding import Engine, Request, Sampling
from lcm.errors import UserError
from lcm.pretrained import names, save_folder

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "1, 2, 3, 4, 5,",
    "The three primary colours are",
    "Dear Sir or Madam,\n\n",
    "La tour Eiffel se trouve",
    "<p>An <b>HTML</b> page",
    "Q: Who wrote Hamlet?\nA:",
)
NEW = 64


@pytest.fixture(scope="module")
def model():
    try:
        names.find("smollm2-135m")
    except UserError as error:
        pytest.skip(str(error))
    return lcm.load("smollm2-135m")


@pytest.mark.slow
def test_greedy_texts_are_those_of_transformers(model, tmp_path):
    """Ten prompts in one batch, and, where caches are pages, through them too."""
    torch = pytest.importorskip("torch", reason="transformers computes with torch")
    transformers = pytest.importorskip("transformers")
    save_folder(model, tmp_path / "folder")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "folder", dtype=torch.float32
    )
    prompts = [model.tokenizer.encode(text) for text in PROMPTS]
    settings = Sampling(temperature=0, max_new_tokens=NEW, stop_ids=model.tokenizer.stops)
    wanted = []
    for prompt in prompts:
        ids = torch.tensor(prompt[None].astype(np.int64))
        out = theirs.generate(ids, max_new_tokens=NEW, do_sample=False)
        wanted.append(out[0, len(prompt) :].tolist())
    for cache in ("contiguous", "paged"):
        got = [[] for _ in prompts]
        for event in Engine(model, rows=4, cache=cache).run(
            [Request(p, settings) for p in prompts]
        ):
            got[event.request].append(event.token)
        assert got == wanted, cache
