"""Conversion to a Hugging Face folder, read by transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from gguf_writing import write
from test_gguf_tokenizer import TEXTS, bpe, train

from lcm import cli, models
from lcm.pretrained import names
from lcm.pretrained.model import load

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A GGUF file and the folder that the command line makes of it."""
    folder = tmp_path_factory.mktemp("convert")

    def text(writer):
        bpe(train("smollm", 96 - 256), "smollm")(writer)
        writer.add_chat_template(TEMPLATE)

    path = write(folder / "tiny.gguf", "llama", tokenizer=text)
    assert cli.main(["convert", str(path), str(folder / "out")]) == 0
    return path, folder / "out"
