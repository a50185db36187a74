"""GGUF files written here with the `gguf` package, and the real one where it is installed."""

import struct

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import lcm
from lcm import models
from lcm.data import gguf as header
from lcm.errors import CheckpointError, DataError
from lcm.pretrained import assemble, chat, names
from lcm.pretrained.gguf import Gguf, readable

from .gguf_writing import MODELS, config, model, weights, write
from .make_golden import logits

Q = gguf.GGMLQuantizationType


@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_that_were_converted(tmp_path, name):
    source = Gguf(write(tmp_path / "tiny.gguf", name))
    wanted = weights(name)
    assert set(source.names()) == set(wanted)
    for key, tensor in wanted.items():
        found = source.read(key)
        assert source.shape(key) == found.shape == tensor.shape
        if "norm" in key and "gemma" in name:
            np.testing.assert_allclose(found, tensor, rtol=0, atol=2e-7)  # + 1 and - 1 in float32
        else:
            np.testing.assert_array_equal(found, tensor, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_config_is_that_of_the_model(tmp_path, name):
    """Every field of the config, as transformers reads both."""
    source = Gguf(write(tmp_path / "tiny.gguf", name))
    wanted = config(name)
    kind = transformers.CONFIG_MAPPING[source.config["model_type"]]
    found = kind.from_dict(dict(source.config))
    assert type(found) is type(wanted)
    own = {"_name_or_path", "architectures", "dtype", "transformers_version", "torch_dtype"}
    own |= {"bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache"}

    def plain(made):
        return {key: value for key, value in made.to_dict().items() if key not in own}

    assert plain(found) == plain(wanted)
    assert source.config["_name_or_path"] == "Tiny"


def test_frequencies_that_no_llama_3_has(tmp_path):
    """Factors of other bands stay factors."""
    factors = np.linspace(1, 3, 8, dtype=np.float32)

    def change(writer):
        writer.add_tensor("rope_freqs.weight", factors)

    scaling = Gguf(write(tmp_path / "tiny.gguf", "llama", change=change)).config["rope_scaling"]
    assert scaling["rope_type"] == "longrope" and scaling["attention_factor"] == 1
    assert scaling["short_factor"] == scaling["long_factor"] == factors.tolist()


@pytest.mark.parametrize(
    "kind",
    [Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0],
    ids=lambda kind: kind.name,
)
def test_quantised_tensors(tmp_path, kind):
    """What comes back is what went in, as far as the type can hold it; rows of q stay in order."""
    wanted = weights("llama")
    stored = {"blk.1.attn_q.weight": kind, "blk.0.ffn_down.weight": kind}
    source = Gguf(write(tmp_path / "tiny.gguf", "llama", stored))
    step = {Q.F16: 2**-11, Q.BF16: 2**-8, Q.Q8_0: 1 / 127}.get(kind, 1 / 8)
    for key in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        found = source.read(key)
        dtype = {Q.F16: "float16", Q.BF16: "bfloat16"}.get(kind, "float32")
        assert found.dtype == dtype and found.shape == wanted[key].shape
        found = found.astype(np.float32)
        assert np.abs(found - wanted[key]).max() < step * np.abs(wanted[key]).max()
        assert (found != wanted[key]).any()


@pytest.mark.parametrize("kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_XS, Q.TQ1_0])
def test_every_block_in_its_place(tmp_path, kind):
    """Types that the package does not write: random blocks, dequantised row by row."""
    rng, (block, size) = np.random.default_rng(0), gguf.GGML_QUANT_SIZES[kind]
    shape, blocks = (7, 3 * block), rng.integers(0, 60, (7, 3 * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name, number in {"block_count": 1, "embedding_length": 3 * block}.items():
        writer.add_uint32(f"llama.{name}", number)
    for name in ("context_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{name}", 1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=kind)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    source = Gguf(tmp_path / "tiny.gguf")
    found = source.read("model.embed_tokens.weight")
    assert source.shape("model.embed_tokens.weight") == found.shape == shape
    rows = [gguf.dequantize(row[None], kind)[0] for row in blocks]
    np.testing.assert_array_equal(found, np.stack(rows))


def test_the_header_is_what_the_package_reads(tmp_path):
    path = write(tmp_path / "tiny.gguf", "phi3", {"output.weight": Q.Q8_0}, change=_every_kind)
    check_header(path)


def _every_kind(writer):
    writer.add_array("some.texts", ["", "ä", "日本語"])
    writer.add_array("some.numbers", [1.5, -2.0])
    writer.add_bool("some.flag", True)
    writer.add_int8("some.small", -3)
    writer.add_uint64("some.large", 2**40)
    writer.add_float64("some.double", 1 / 3)


def check_header(path):
    found, reader = header.read(path), gguf.GGUFReader(path)
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert found.metadata == {key: field.contents() for key, field in fields.items()}
    for tensor in reader.tensors:
        info = found.tensors.pop(tensor.name)
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.type, info.start) == (tensor.tensor_type, tensor.data_offset)
    assert not found.tensors


def refused(error, match, function, *arguments):
    with pytest.raises(error, match=match) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)


def test_files_cut_short_anywhere(tmp_path):
    """Each prefix of a file is refused in a sentence, whatever it ends in."""
    whole = write(tmp_path / "tiny.gguf", "llama").read_bytes()
    start = min(info.start for info in header.read(tmp_path / "tiny.gguf").tensors.values())
    part = tmp_path / "part.gguf"
    for size in [*range(4), 4, 7, 8, 20, *range(24, start - 32, 13)]:
        part.write_bytes(whole[:size])
        match = "not a GGUF file" if size < 4 else "ends within its header"
        refused(DataError, match, Gguf, part)
    for size in (start, len(whole) - 33):
        part.write_bytes(whole[:size])
        refused(CheckpointError, r"tensor \S+ of \S+ ends at byte .* cut short", Gguf, part)


def test_files_that_are_no_gguf(tmp_path):
    path = tmp_path / "x.gguf"
    refused(DataError, "cannot be read", Gguf, path)
    path.write_bytes(b"PK\x03\x04" * 20)
    refused(DataError, "not a GGUF file", Gguf, path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    refused(DataError, "GGUF version 1, and versions 2 and 3 are read", Gguf, path)
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    refused(DataError, "of a big-endian machine", Gguf, path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    refused(DataError, "has no metadata general.architecture", Gguf, path)
    damaged = struct.pack("<Q", 1) + b"a" + struct.pack("<I", 77) + b"\0" * 8
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + damaged)
    refused(DataError, "metadata of type 77", Gguf, path)
    huge = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 4, 2**61)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + huge)
    refused(DataError, "ends within its header", Gguf, path)


def test_models_that_cannot_be(tmp_path):
    def with_change(change):
        return write(tmp_path / "x.gguf", "llama", change=change)

    path = with_change(None)
    raw = path.read_bytes()
    for number, shown in ((99, "type 99, of no known name"), (15, "type Q8_K")):
        at = raw.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
        path.write_bytes(raw[:at] + struct.pack("<I", number) + raw[at + 4 :])
        refused(CheckpointError, f"tensor output_norm.weight .* {shown}, and F32, F16", Gguf, path)
    refused(CheckpointError, "8 experts", Gguf, with_change(lambda w: w.add_expert_count(8)))
    scaled = with_change(lambda w: w.add_string("llama.rope.scaling.type", "spiral"))
    refused(CheckpointError, "scales positions by 'spiral'", Gguf, scaled)
    split = with_change(lambda w: w.add_uint16("split.count", 3))
    refused(DataError, "one of 3 parts", Gguf, split)
    gguf.GGUFWriter(path, "rwkv7").add_name("x")
    other = gguf.GGUFWriter(path, "rwkv7")
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.close()
    refused(CheckpointError, "architecture rwkv7, and llama, qwen2, .* are known", Gguf, path)


def test_types_that_can_be_read():
    names = set(readable().values())
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"} <= names
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4"} <= names
    assert not {"I32", "F64", "Q8_K"} & names


@pytest.mark.quick("llama3", "qwen2_yarn", "gemma3", "phi3")
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model_that_was_converted(tmp_path, name):
    """All the way: the file's config and tensors as a model of lcm, beside transformers."""
    pytest.importorskip("torch", reason="transformers computes with torch")
    cfg, params = assemble(Gguf(write(tmp_path / "tiny.gguf", name)))
    length = 100 if name == "phi3" else 48  # beyond the original length, where factors change
    row = np.random.default_rng(0).integers(0, 96, (1, length))
    wanted = logits(model(name), row)
    got, _ = models.apply(cfg, params, jnp.asarray(row))
    assert np.std(wanted) > 0.2
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


# --- the real file ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    try:
        return names.find("smollm2-135m")
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_real_header(real):
    check_header(real)


def read_by_transformers(path):
    """The model of transformers' own reading of a file; `from_pretrained` needs accelerate too."""
    torch = pytest.importorskip("torch", reason="transformers computes with torch")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    found = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    made = transformers.AutoModelForCausalLM.from_config(found, dtype=torch.float32).eval()
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=made)["tensors"]
    missing, unexpected = made.load_state_dict(read, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    return made


@pytest.mark.slow
def test_the_real_model(real):
    """Tensors and, at three lengths through `lcm.load`, logits of transformers.

    Logits go to 41 here: they agree to 1e-5 of the largest.
    """
    theirs, source = read_by_transformers(real), Gguf(real)
    for name, wanted in theirs.state_dict().items():
        if name != "lm_head.weight":
            np.testing.assert_array_equal(source.read(name), wanted.numpy(), err_msg=name)
    loaded = lcm.load("smollm2-135m")
    text = "The length of a text is how far its reader must remember. " * 100
    ids = loaded.tokenizer.encode(text)
    for length in (7, 128, 1000):
        row = ids[None, :length]
        wanted = logits(theirs, row)
        got, _ = lcm.apply(loaded.cfg, loaded.params, jnp.asarray(row))
        print(f"{length} tokens: largest deviation {np.abs(got - wanted).max():.2e}")
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
def test_the_real_model_answers(real):
    """Template, tokenizer and weights together."""
    loaded = lcm.load("smollm2-135m")
    question = [{"role": "user", "content": "What is the capital of France? One word."}]
    prompt = chat.render(loaded.chat_template, question)
    ids = loaded.tokenizer.encode(prompt, special=True).tolist()
    start = len(ids)
    while ids[-1] not in loaded.tokenizer.stops and len(ids) < start + 20:
        row = jnp.asarray([ids + [0] * (start + 20 - len(ids))])  # one compilation
        logits, _ = lcm.apply(loaded.cfg, loaded.params, row)
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    assert "Paris" in loaded.tokenizer.decode(ids[start:])
    assert ids[-1] == loaded.tokenizer.eos
