"""Greedy tokens of every family as `generate` of transformers writes them."""

import numpy as np
import pytest

from lcm import decoding

from . import cases, make_golden

DEFAULT = ("llama", "gemma3", "bloom")
NAMES = [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in cases.CONFIGS]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers(loaded, name):
    """Beyond windows and the trained length, but for those that follow the length; in chunks."""
    torch = pytest.importorskip("torch", reason="transformers computes with torch")
    pytest.importorskip("transformers")
    count, new = (8, cases.TRAINED - 8) if name in cases.BY_LENGTH else (19, 16)
    prompts = cases.tokens(count)
    with torch.no_grad():
        want = make_golden.reference(name).generate(
            torch.from_numpy(prompts),
            attention_mask=torch.ones(prompts.shape),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=cases.VOCAB,  # none of them
            pad_token_id=0,
        )
    found = decoding.generate(
        loaded(name), list(prompts), max_new_tokens=new, temperature=0.0, stop_ids=(),
        full="config", engine={"chunk": 8},
    )  # fmt: skip
    np.testing.assert_array_equal([g.tokens for g in found], want[:, count:])
