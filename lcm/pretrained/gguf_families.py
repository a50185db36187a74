"""What llama.cpp's converters make of each architecture, undone: configs, names, values.

Keys and tensors are those of the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md) and of
gguf-py's constants; what is done to values is said where it is undone.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from lcm.data.gguf import Header
from lcm.errors import CheckpointError

Config = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The keys of an architecture, without its name before them."""

    header: Header
    architecture: str

    def __getitem__(self, key: str) -> Any:
        return self.header.need(f"{self.architecture}.{key}")

    def get(self, key: str, default: Any = None) -> Any:
        return self.header.metadata.get(f"{self.architecture}.{key}", default)

    def tensor(self, name: str) -> list[float] | None:
        """The numbers of a small float32 tensor that is part of the config."""
        if name not in self.header.tensors:
            return None
        info = self.header.tensors[name]
        return self.header.data[info.start : info.start + 4 * info.size].view("<f4").tolist()


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How an architecture's GGUF becomes a Hugging Face checkpoint.

    config: the content of its `config.json`.
    top: names of tensors outside of layers, without `.weight` or `.bias`.
    layer: what `blk.N` is called, and the names of tensors within.
    restore: `(tensor, Hugging Face name, config) -> tensor` undoes what the converter did.
    """

    config: Callable[[Metadata], Config]
    top: dict[str, str]
    layer: str
    within: dict[str, str]
    restore: Callable[[np.ndarray, str, Config], np.ndarray]

    def name(self, stored: str) -> str:
        """The Hugging Face name of a tensor; empty for one that is part of the config.

        One that is not known keeps its name, and is refused with it.
        """
        if stored.startswith("rope_"):
            return ""
        stem, _, kind = stored.rpartition(".")
        if found := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
            number, part = found.groups()
            if part in self.within:
                return f"{self.layer}.{number}.{self.within[part]}.{kind}"
        return f"{self.top[stem]}.{kind}" if stem in self.top else stored


# --- configs ---------------------------------------------------------------------------------


def _common(meta: Metadata, model_type: str, activation: str = "silu") -> Config:
    """What the models after Llama have in common."""
    if meta.get("expert_count"):
        raise CheckpointError(
            f"{meta.header.path} has {meta['expert_count']} experts "
            f"({meta.architecture}.expert_count), which the decoder does not have: take another"
        )
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(meta.get(key), list) and len(set(meta[key])) > 1:
            raise CheckpointError(
                f"{meta.header.path} has {meta.architecture}.{key} that differs between layers, "
                "which the decoder does not have: take another model"
            )
    heads = _one(meta["attention.head_count"])
    return {
        "model_type": model_type,
        "vocab_size": _vocabulary(meta),
        "hidden_size": meta["embedding_length"],
        "intermediate_size": _one(meta["feed_forward_length"]),
        "num_hidden_layers": meta["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": _one(meta.get("attention.head_count_kv", heads)),
        "head_dim": _head_size(meta),
        "hidden_act": activation,
        "max_position_embeddings": meta["context_length"],
        "rms_norm_eps": _short(meta["attention.layer_norm_rms_epsilon"]),
        "rope_theta": meta.get("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in meta.header.tensors,
    }


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _short(value: float) -> float:
    """The decimal number of which a float32 is the nearest: 1e-5, not 9.999999747e-06."""
    return float(np.format_float_positional(np.float32(value), unique=True))


def _vocabulary(meta: Metadata) -> int:
    if "token_embd.weight" not in meta.header.tensors:
        raise CheckpointError(
            f"{meta.header.path} has no tensor token_embd.weight: it is no whole model, take "
            "another file"
        )
    return meta.header.tensors["token_embd.weight"].shape[0]


def _head_size(meta: Metadata) -> int:
    size = meta["embedding_length"] // _one(meta["attention.head_count"])
    return meta.get("attention.key_length", size)


def _scaling(meta: Metadata, head_size: int) -> Config:
    """`rope_scaling`, from the keys or from the tensors of factors by which angles are divided."""
    kind = meta.get("rope.scaling.type", "none")
    original = meta.get("rope.scaling.original_context_length")
    if short := meta.tensor("rope_factors_short.weight"):
        found = {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": meta.tensor("rope_factors_long.weight"),
            "original_max_position_embeddings": original,
            "attention_factor": _maybe_short(meta.get("rope.scaling.attn_factor")),
        }
    elif factors := meta.tensor("rope_freqs.weight"):
        found = _bands(meta, np.array(factors), head_size)
    elif kind == "none":
        found = None
    elif kind in ("linear", "yarn"):
        found = {
            "rope_type": kind,
            "factor": _short(meta["rope.scaling.factor"]),
            "original_max_position_embeddings": original if kind == "yarn" else None,
            "beta_fast": _maybe_short(meta.get("rope.scaling.yarn_beta_fast")),
            "beta_slow": _maybe_short(meta.get("rope.scaling.yarn_beta_slow")),
        }
    else:
        raise CheckpointError(
            f"{meta.header.path} scales positions by {kind!r} "
            f"({meta.architecture}.rope.scaling.type), and none, linear, yarn and longrope are "
            "known: take another model"
        )
    if found is None:
        return {}
    return {"rope_scaling": {key: value for key, value in found.items() if value is not None}}


def _maybe_short(value: float | None) -> float | None:
    return None if value is None else _short(value)


def _bands(meta: Metadata, factors: np.ndarray, head_size: int) -> Config:
    """Llama 3's scaling, of which a file has the factors alone.

    Waves shorter than original / high stay, those longer than original / low are stretched by the
    factor, between is a line. All of Llama 3.1 to 3.3 have low 1, high 4, original 8192; factors of
    other numbers are those of a LongRoPE that is short and long alike.
    """
    low, high, original = 1.0, 4.0, 8192
    rotated = meta.get("rope.dimension_count", head_size)
    waves = 2 * np.pi * meta["rope.freq_base"] ** (np.arange(0, rotated, 2) / rotated)
    between = np.clip((original / waves - low) / (high - low), 0, 1)
    factor = _short(factors.max())
    expected = 1 / ((1 - between) / factor + between)
    if factors.shape == waves.shape and np.allclose(factors, expected, rtol=1e-4):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
    return {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "original_max_position_embeddings": meta["context_length"],
        "attention_factor": 1.0,
    }


def _llama(meta: Metadata) -> Config:
    window = meta.get("attention.sliding_window")
    config = _common(meta, "mistral" if window else "llama")
    biased = "blk.0.attn_q.bias" in meta.header.tensors
    return (
        config
        | _scaling(meta, config["head_dim"])
        | ({"sliding_window": window} if window else {"attention_bias": biased})
    )


def _qwen(meta: Metadata) -> Config:
    config = _common(meta, meta.architecture)
    return config | _scaling(meta, config["head_dim"]) | {"use_sliding_window": False}


def _gemma(meta: Metadata, model_type: str, period: int, largest: int) -> Config:
    """Gemma 2 and 3: one layer in `period` reads all of the text, the others a window.

    Scores are divided by the root of the size of a head, in the largest model (told by its depth)
    of the width by the number of heads; no key says so.
    """
    config = _common(meta, model_type, "gelu_pytorch_tanh")
    config["hidden_activation"] = config.pop("hidden_act")
    depth, head_size = config["num_hidden_layers"], config["head_dim"]
    by_width = config["hidden_size"] // config["num_attention_heads"]
    return config | {
        "sliding_window": meta["attention.sliding_window"],
        "layer_types": [
            "full_attention" if n % period == period - 1 else "sliding_attention"
            for n in range(depth)
        ],
        "query_pre_attn_scalar": by_width if depth == largest else head_size,
    }


def _gemma2(meta: Metadata) -> Config:
    return _gemma(meta, "gemma2", period=2, largest=46) | {
        "attn_logit_softcapping": meta.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": meta.get("final_logit_softcapping", 30.0),
    }


def _gemma3(meta: Metadata) -> Config:
    config = _gemma(meta, "gemma3_text", period=6, largest=62)
    config["rope_theta"] = meta.get("rope.freq_base", 1_000_000.0)
    config["rope_local_base_freq"] = meta.get("rope.freq_base_swa", 10_000.0)
    cap = meta.get("final_logit_softcapping")
    return (
        config
        | _scaling(meta, config["head_dim"])
        | ({"final_logit_softcapping": cap} if cap else {})
    )


def _phi3(meta: Metadata) -> Config:
    config = _common(meta, "phi3")
    head_size, window = config.pop("head_dim"), meta.get("attention.sliding_window")
    original = meta.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    rotated = meta.get("rope.dimension_count", head_size) / head_size
    return (
        config
        | _scaling(meta, head_size)
        | {"original_max_position_embeddings": original, "sliding_window": window or None}
        | ({"partial_rotary_factor": rotated} if rotated < 1 else {})
    )


def _gpt_neox(meta: Metadata) -> Config:
    heads = meta["attention.head_count"]
    return {
        "model_type": "gpt_neox",
        "vocab_size": _vocabulary(meta),
        "hidden_size": meta["embedding_length"],
        "intermediate_size": meta["feed_forward_length"],
        "num_hidden_layers": meta["block_count"],
        "num_attention_heads": heads,
        "max_position_embeddings": meta["context_length"],
        "layer_norm_eps": _short(meta["attention.layer_norm_epsilon"]),
        "hidden_act": "gelu",
        "rotary_pct": meta["rope.dimension_count"] / _head_size(meta),
        "rotary_emb_base": meta.get("rope.freq_base", 10_000.0),
        "use_parallel_residual": meta.get("use_parallel_residual", True),
        "tie_word_embeddings": "output.weight" not in meta.header.tensors,
    }


def _bloom(meta: Metadata) -> Config:
    return {
        "model_type": "bloom",
        "vocab_size": _vocabulary(meta),
        "hidden_size": meta["embedding_length"],
        "n_layer": meta["block_count"],
        "n_head": meta["attention.head_count"],
        "seq_length": meta["context_length"],
        "layer_norm_epsilon": _short(meta["attention.layer_norm_epsilon"]),
    }


def _mpt(meta: Metadata) -> Config:
    width = meta["embedding_length"]
    attention = {
        "alibi": meta.get("attention.max_alibi_bias", 0.0) > 0,
        "alibi_bias_max": int(meta.get("attention.max_alibi_bias", 8)),
        "clip_qkv": meta.get("attention.clamp_kqv"),
    }
    return {
        "model_type": "mpt",
        "vocab_size": _vocabulary(meta),
        "d_model": width,
        "n_heads": meta["attention.head_count"],
        "n_layers": meta["block_count"],
        "expansion_ratio": meta["feed_forward_length"] // width,
        "max_seq_len": meta["context_length"],
        "layer_norm_epsilon": _short(meta["attention.layer_norm_epsilon"]),
        "no_bias": "blk.0.ffn_up.bias" not in meta.header.tensors,
        "attn_config": {key: value for key, value in attention.items() if value is not None},
    }


# --- values ----------------------------------------------------------------------------------


def _same(tensor: np.ndarray, name: str, config: Config) -> np.ndarray:
    return tensor


def _unpaired(tensor: np.ndarray, name: str, config: Config) -> np.ndarray:
    """Rows of q and k of Llama: pair i of a head lies at 2i and 2i + 1, here at i and half + i."""
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if f".{part}." in name:
            pairs = tensor.reshape(config[heads], -1, 2, *tensor.shape[1:])
            return pairs.swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def _one_less(tensor: np.ndarray, name: str, config: Config) -> np.ndarray:
    """Norms of Gemma, which multiplies by 1 + weight, where the file has the whole factor."""
    return tensor.astype(np.float32) - 1 if name.endswith("norm.weight") else tensor


def _by_head(tensor: np.ndarray, name: str, config: Config) -> np.ndarray:
    """Rows of qkv of GPT-NeoX and BLOOM: here head by head, in the file all of q, of k, of v."""
    if "query_key_value" not in name:
        return tensor
    heads = config.get("num_attention_heads") or config["n_head"]
    parts = tensor.reshape(3, heads, -1, *tensor.shape[1:])
    return parts.swapaxes(0, 1).reshape(tensor.shape)


# --- names -----------------------------------------------------------------------------------

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = "model.layers"
_WITHIN = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WITHIN_GEMMA = _WITHIN | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_WITHIN_PHI3 = _WITHIN | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_TOP_NEOX = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
}
_WITHIN_NEOX = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_TOP_BLOOM = {
    "token_embd": "transformer.word_embeddings",
    "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_WITHIN_BLOOM = _WITHIN_NEOX | {
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
}
_TOP_MPT = {
    "token_embd": "transformer.wte",
    "output_norm": "transformer.norm_f",
    "output": "lm_head",
}
_WITHIN_MPT = {
    "attn_norm": "norm_1",
    "attn_qkv": "attn.Wqkv",
    "attn_output": "attn.out_proj",
    "ffn_norm": "norm_2",
    "ffn_up": "ffn.up_proj",
    "ffn_down": "ffn.down_proj",
}

ARCHITECTURES = {
    "llama": Architecture(_llama, _TOP, _LAYER, _WITHIN, _unpaired),
    "qwen2": Architecture(_qwen, _TOP, _LAYER, _WITHIN, _same),
    "qwen3": Architecture(_qwen, _TOP, _LAYER, _WITHIN, _same),
    "gemma2": Architecture(_gemma2, _TOP, _LAYER, _WITHIN_GEMMA, _one_less),
    "gemma3": Architecture(_gemma3, _TOP, _LAYER, _WITHIN_GEMMA, _one_less),
    "phi3": Architecture(_phi3, _TOP, _LAYER, _WITHIN_PHI3, _same),
    "gptneox": Architecture(_gpt_neox, _TOP_NEOX, "gpt_neox.layers", _WITHIN_NEOX, _by_head),
    "bloom": Architecture(_bloom, _TOP_BLOOM, "transformer.h", _WITHIN_BLOOM, _by_head),
    "mpt": Architecture(_mpt, _TOP_MPT, "transformer.blocks", _WITHIN_MPT, _same),
}
