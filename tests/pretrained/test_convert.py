"""Conversion to a Hugging Face folder, read again here and by transformers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import lcm
from lcm import cli, models
from lcm.errors import CheckpointError
from lcm.pretrained import chat, names

from .gguf_writing import weights, write
from .make_golden import logits
from .test_gguf_tokenizer import TEXTS, bpe, train

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A GGUF file and the folder that the command line makes of it."""
    folder = tmp_path_factory.mktemp("convert")

    def text(writer):
        bpe(train("smollm"), "smollm", eot=3)(writer)
        writer.add_chat_template(TEMPLATE)

    path = write(folder / "tiny.gguf", "llama_worded", tokenizer=text)
    assert cli.main(["convert", str(path), str(folder / "out")]) == 0
    return path, folder / "out"


def test_the_model_is_the_same(converted):
    before, after = (lcm.load(path) for path in converted)
    assert models.spec(before.cfg) == models.spec(after.cfg)
    row = jnp.arange(30)[None]
    wanted, got = (models.apply(model.cfg, model.params, row)[0] for model in (before, after))
    np.testing.assert_array_equal(got, wanted)
    assert before.chat_template == after.chat_template == TEMPLATE
    assert before.tokenizer.stops == after.tokenizer.stops == (2, 3, 0)
    for text in TEXTS:
        np.testing.assert_array_equal(after.tokenizer.encode(text), before.tokenizer.encode(text))
    assert (before.cfg.name, before.step) == ("tiny", 0)


def test_transformers_reads_the_text(converted):
    path, folder = converted
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = lcm.load(path).tokenizer
    for text in TEXTS:
        wanted = ours.encode(text, special=True).tolist()
        assert theirs.encode(text, add_special_tokens=False) == wanted
        assert theirs.decode(wanted) == ours.decode(wanted, special=True)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)
    talk = [{"role": "user", "content": "the dogs"}]
    assert theirs.apply_chat_template(talk, tokenize=False) == chat.render(TEMPLATE, talk)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"] == TEMPLATE


def test_transformers_reads_the_weights(converted):
    pytest.importorskip("torch", reason="transformers computes with torch")
    path, folder = converted
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), weights("llama_worded")[name])
    row = np.arange(30)[None]
    model = lcm.load(path)
    got, _ = models.apply(model.cfg, model.params, jnp.asarray(row))
    np.testing.assert_allclose(got, logits(theirs, row), rtol=1e-4, atol=1e-4)


def test_other_precision_and_what_is_refused(converted, tmp_path, capsys):
    path, folder = converted
    assert cli.main(["convert", str(folder), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert "wrote" in capsys.readouterr().out
    whole, half = ((at / "model.safetensors").stat().st_size for at in (folder, tmp_path / "half"))
    assert half < 0.6 * whole
    assert lcm.load(tmp_path / "half").tokenizer.stops == (2, 3, 0)

    def refused(match, *words):
        assert cli.main(["convert", *map(str, words)]) == 2
        assert match in capsys.readouterr().err

    refused("exists and is not empty", path, folder)
    refused("dtype='int4' is unknown", path, tmp_path / "x", "--dtype", "int4")
    refused("'nothing' is no path, and no model", "nothing", tmp_path / "x")
    refused("takes no --config.KEY=VALUE", path, tmp_path / "x", "--config.name=a")


def test_a_gguf_without_text(tmp_path):
    model = lcm.load(write(tmp_path / "tiny.gguf", "llama"))
    assert model.tokenizer is None and model.chat_template == ""


@pytest.mark.slow
def test_the_real_model(tmp_path):
    """The name becomes a folder that transformers reads: the same ids, tensors of the file."""
    pytest.importorskip("torch", reason="transformers computes with torch")
    try:
        names.find("smollm2-135m")
    except CheckpointError as error:
        pytest.skip(str(error))
    assert cli.main(["convert", "smollm2-135m", str(tmp_path / "out")]) == 0
    model = lcm.load("smollm2-135m")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        wanted = model.tokenizer.encode(text, special=True).tolist()
        assert theirs.encode(text, add_special_tokens=False) == wanted
    talk = [{"role": "user", "content": "Hello!"}]
    prompt = chat.render(model.chat_template, talk)
    assert theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == prompt
    row = model.tokenizer.encode(prompt, special=True)[None]
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    got, _ = models.apply(model.cfg, model.params, jnp.asarray(row))
    np.testing.assert_allclose(got, logits(read, row), rtol=1e-4, atol=1e-4)
