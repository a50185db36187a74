"""BLOOM and MPT: ALiBi, LayerNorm, fused q, k and v."""

from typing import Any

from lcm import positions
from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.pretrained.families.base import (
    BY_HEAD,
    FUSED,
    LINEAR,
    SAME,
    Config,
    Family,
    layers_to_hf,
    need,
    weights,
)


def read_bloom(hf: Config) -> dict[str, Any]:
    need(hf, "apply_residual_connection_post_layernorm", False)
    width = hf.get("hidden_size") or need(hf, "n_embed")
    depth = hf.get("n_layer") or need(hf, "num_hidden_layers")
    heads = hf.get("n_head") or need(hf, "num_attention_heads")
    return {
        **_shared(hf, width, depth, heads),
        "mlp": "gelu",
        "norm": "layer",
        "biases": "all",
        "embed_norm": True,
    }


def read_mpt(hf: Config) -> dict[str, Any]:
    attention = {"alibi": True, **(hf.get("attn_config") or {})}
    need(hf, "no_bias", True)
    need(hf, "logit_scale", None)
    for key in ("clip_qkv", "qk_ln", "prefix_lm"):
        need(attention, key, None, False)
    need(attention, "attn_type", None, "multihead_attention")
    need(attention, "alibi", True)
    need(hf, "expansion_ratio", 4)  # as transformers has it, whatever a config says
    return {
        **_shared(hf, need(hf, "d_model"), need(hf, "n_layers"), need(hf, "n_heads")),
        "mlp": "gelu_exact",
        "norm": "layer_no_bias",
        "score_scale": float(attention.get("softmax_scale") or 0),
    }


def _shared(hf: Config, width: int, depth: int, heads: int) -> dict[str, Any]:
    return {
        "width": width,
        "depth": depth,
        "hidden": 4 * width,
        "heads": heads,
        "kv_heads": heads,
        "vocab": need(hf, "vocab_size"),
        "tied": bool(need(hf, "tie_word_embeddings")),
        "norm_eps": need(hf, "layer_norm_epsilon"),
        "positions": positions.config(positions.from_hf(hf)),
    }


def write_bloom(spec: ModelSpec, length: int) -> Config:
    _check_alibi(spec)
    return {
        "model_type": "bloom",
        "hidden_size": spec.width,
        "n_layer": spec.depth,
        "n_head": spec.layers[0].heads,
        "seq_length": length,
        **_shared_to_hf(spec),
    }


def write_mpt(spec: ModelSpec, length: int) -> Config:
    _check_alibi(spec)
    layer = spec.layers[0]
    return {
        "model_type": "mpt",
        "d_model": spec.width,
        "n_layers": spec.depth,
        "n_heads": layer.heads,
        "max_seq_len": length,
        "expansion_ratio": 4,
        "attn_config": {"alibi": True, "softmax_scale": layer.score_scale or None},
        **_shared_to_hf(spec),
    }


def _shared_to_hf(spec: ModelSpec) -> Config:
    return {
        "vocab_size": spec.vocab,
        "tie_word_embeddings": spec.tied,
        "layer_norm_epsilon": spec.norm_eps,
    }


def _check_alibi(spec: ModelSpec) -> None:
    if layers_to_hf(spec)[2] != {"alibi": True}:
        raise ConfigError(f"positions are {type(spec.positions).__name__}, it has ALiBi")


LAYER = "transformer.h.{n}"
BLOOM = Family(
    types={"bloom": "BloomForCausalLM"},
    read=read_bloom,
    write=write_bloom,
    defaults={
        "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
        "seq_length": 2048,  # of the releases, which transformers does not read
    },
    weights=weights(
        ("transformer.word_embeddings.weight", "embedding/table", SAME),
        ("transformer.word_embeddings_layernorm.weight", "embedding/norm/scale", SAME),
        ("transformer.ln_f.weight", "final_norm/scale", SAME),
        ("lm_head.weight", "head/kernel", LINEAR),
        (f"{LAYER}.self_attention.query_key_value.weight", "mixer/q mixer/k mixer/v", BY_HEAD),
        (f"{LAYER}.self_attention.dense.weight", "mixer/out", LINEAR),
        (f"{LAYER}.mlp.dense_h_to_4h.weight", "mlp/up", LINEAR),
        (f"{LAYER}.mlp.dense_4h_to_h.weight", "mlp/down", LINEAR),
        (f"{LAYER}.input_layernorm.weight", "mixer_norm/scale", SAME),
        (f"{LAYER}.post_attention_layernorm.weight", "mlp_norm/scale", SAME),
    ),
    # The releases have the model without its head.
    renamed=((r"^(word_embeddings|word_embeddings_layernorm|h|ln_f)\.", r"transformer.\1."),),
)
BLOCK = "transformer.blocks.{n}"
MPT = Family(
    types={"mpt": "MptForCausalLM"},
    read=read_mpt,
    write=write_mpt,
    defaults={
        "expansion_ratio": 4,
        "max_seq_len": 2048,
        "layer_norm_epsilon": 1e-5,
        "no_bias": True,
        "tie_word_embeddings": True,
    },
    weights=weights(
        ("transformer.wte.weight", "embedding/table", SAME),
        ("transformer.norm_f.weight", "final_norm/scale", SAME),
        ("lm_head.weight", "head/kernel", LINEAR),
        (f"{BLOCK}.attn.Wqkv.weight", "mixer/q mixer/k mixer/v", FUSED),
        (f"{BLOCK}.attn.out_proj.weight", "mixer/out", LINEAR),
        (f"{BLOCK}.ffn.up_proj.weight", "mlp/up", LINEAR),
        (f"{BLOCK}.ffn.down_proj.weight", "mlp/down", LINEAR),
        (f"{BLOCK}.norm_1.weight", "mixer_norm/scale", SAME),
        (f"{BLOCK}.norm_2.weight", "mlp_norm/scale", SAME),
    ),
)
