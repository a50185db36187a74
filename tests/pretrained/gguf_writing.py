"""GGUF files of tiny random models, written with the `gguf` package as llama.cpp's converters do.

Names of tensors are those of the package's own table, metadata is spelled out for each
architecture, and what the converters do to values is done here in their direction.
"""

import functools
import re

import gguf
import numpy as np
import transformers

from lcm import models
from lcm.pretrained.assemble import read_config
from lcm.pretrained.families import family_of
from lcm.pretrained.layout import layout, tensor_shapes

from . import cases

F32 = gguf.GGMLQuantizationType.F32
_SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
_LENGTH = {"max_position_embeddings": 128}
_GEMMA = _LLAMA | _LENGTH | {"num_hidden_layers": 7, "head_dim": 32, "sliding_window": 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}
_LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
_LOCAL = {"rope_type": "default", "rope_theta": 10_000.0}
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + n / 8 for n in range(8)],
    "long_factor": [2.0 + n / 4 for n in range(8)],
    "rope_theta": 10_000.0,
}


def _yarn(**more):
    return {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0} | more


# Models by a name of their own: architecture in the file, type and fields of the config.
MODELS = {
    "llama": ("llama", "llama", _LLAMA | _LENGTH),
    "llama3": ("llama", "llama", _LLAMA | _LENGTH | {"rope_parameters": _LLAMA3}),
    "llama_tied": ("llama", "llama", _LLAMA | _LENGTH | {"tie_word_embeddings": True}),
    "llama_biased": ("llama", "llama", _LLAMA | _LENGTH | {"attention_bias": True}),
    "llama_worded": ("llama", "llama", _LLAMA | _LENGTH | {"vocab_size": 601}),
    "mistral": ("llama", "mistral", _LLAMA | _LENGTH | {"sliding_window": 32}),
    "qwen2": ("qwen2", "qwen2", _LLAMA | _LENGTH | {"tie_word_embeddings": True}),
    "qwen2_yarn": (
        *("qwen2", "qwen2"),
        _LLAMA
        | _LENGTH
        | {"rope_parameters": _yarn(original_max_position_embeddings=32, beta_fast=16.0)},
    ),
    "qwen3": ("qwen3", "qwen3", _LLAMA | _LENGTH | {"head_dim": 32}),
    "gemma2": (
        *("gemma2", "gemma2"),
        _GEMMA | {"query_pre_attn_scalar": 32, "num_hidden_layers": 4},
    ),
    "gemma3": (
        *("gemma3", "gemma3_text"),
        _GEMMA
        | {"query_pre_attn_scalar": 32}
        | {"rope_parameters": {"full_attention": _LINEAR, "sliding_attention": _LOCAL}},
    ),
    "phi3": (
        *("phi3", "phi3"),
        _SMALL
        | {"intermediate_size": 96, "num_key_value_heads": 2}
        | {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
        | {"rope_parameters": _LONG, "sliding_window": None, "pad_token_id": 0},
    ),
    "gptneox": ("gptneox", "gpt_neox", _SMALL | _LENGTH | {"intermediate_size": 96}),
    "bloom": (
        *("bloom", "bloom"),
        {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4, "seq_length": 2048},
    ),
    "mpt": (
        *("mpt", "mpt"),
        {"vocab_size": 96, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    ),
}


@functools.cache
def config(name):
    _, kind, fields = MODELS[name]
    return transformers.CONFIG_MAPPING[kind](**fields)


@functools.cache
def weights(name):
    """Tensors by their Hugging Face names; a tied output is left out."""
    hf = config(name).to_dict()
    family = family_of(hf)
    leaves = layout(family, models.spec(read_config(family, hf)))
    return {key: cases.tensor(key, shape) for key, shape in tensor_shapes(leaves).items()}


def model(name):
    """The model of transformers."""
    import torch

    made = transformers.AutoModelForCausalLM.from_config(config(name)).eval()
    tensors = {key: torch.asarray(tensor) for key, tensor in weights(name).items()}
    if "embed_out.weight" in tensors:  # its name in published files
        tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    missing, unexpected = made.load_state_dict(tensors, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected
    return made


def write(path, name, types=None, change=None, tokenizer=None):
    """Writes a model; `types` has quantisations by GGUF name, `change(writer)` adds metadata."""
    architecture, _, _ = MODELS[name]
    hf = config(name)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    _metadata(writer, architecture, hf)
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture),
        hf.num_hidden_layers,
    )
    for key, tensor in weights(name).items():
        plain = key.removeprefix("transformer.") if architecture == "bloom" else key
        stored = names.get_name(plain, try_suffixes=(".weight", ".bias"))
        assert stored, key
        kind = (types or {}).get(stored, F32)
        data = np.ascontiguousarray(_converted(tensor, key, architecture, hf))
        writer.add_tensor(stored, gguf.quantize(data, kind), raw_dtype=kind)
    for more in (change, tokenizer):
        if more:
            more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _converted(tensor, key, architecture, config):
    heads = config.num_attention_heads
    if architecture == "llama" and (found := re.search(r"\.([qk])_proj\.", key)):
        heads = heads if found[1] == "q" else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if architecture.startswith("gemma") and key.endswith("norm.weight"):
        return tensor + 1
    if "query_key_value" in key:
        parts = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
        return np.concatenate([parts[:, n].reshape(-1, *tensor.shape[1:]) for n in range(3)])
    return tensor


def _metadata(writer, architecture, config):
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "bloom":
        writer.add_context_length(2048)
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    elif architecture == "mpt":
        writer.add_context_length(config.max_seq_len)
        writer.add_feed_forward_length(4 * config.d_model)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        writer.add_max_alibi_bias(8.0)
    elif architecture == "gptneox":
        writer.add_context_length(config.max_position_embeddings)
        writer.add_feed_forward_length(config.intermediate_size)
        size = config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * size))
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_context_length(config.max_position_embeddings)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        _rope(writer, architecture, config)


def _rope(writer, architecture, config):
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if size * config.num_attention_heads != config.hidden_size or "gemma" in architecture:
        writer.add_key_length(size)
        writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    if architecture.startswith("gemma") or config.model_type == "mistral":
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    if kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        for which in ("long", "short"):
            factors = np.array(rope[f"{which}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{which}.weight", factors)
    if kind == "llama3":
        factors = []
        for frequency in rope["rope_theta"] ** (-np.arange(0, size, 2) / size):
            wave = 2 * np.pi / frequency
            low, high = (8192 / rope[f"{end}_freq_factor"] for end in ("low", "high"))
            if wave < high:
                factors.append(1)
            elif wave > low:
                factors.append(rope["factor"])
            else:
                smooth = (8192 / wave - 1) / (4 - 1)
                factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
