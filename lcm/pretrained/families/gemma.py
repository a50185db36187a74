"""Gemma 2 and Gemma 3, whose layers alternate between a window and all (the text part of it)."""

from typing import Any

from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.pretrained.families import llama
from lcm.pretrained.families.base import (
    ATTENTION_AND_MLP,
    FULL,
    LINEAR,
    ONE_LESS,
    SAME,
    SLIDING,
    Config,
    Family,
    layer_names,
    layered,
    layers_to_hf,
    need,
    rotations,
    sizes,
    sizes_to_hf,
    weights,
)


def read_gemma2(hf: Config) -> dict[str, Any]:
    every = need(hf, "sliding_window_pattern", 2)
    return {**_shared(hf, every), "score_cap": float(hf.get("attn_logit_softcapping") or 0)}


def read_gemma3(hf: Config) -> dict[str, Any]:
    need(hf, "attn_logit_softcapping", None)  # which transformers does not read either
    every = need(hf, "sliding_window_pattern")
    return {**_shared(hf, every, by_kind=True), "qk_norm": True}


def _shared(hf: Config, every: int, *, by_kind: bool = False) -> dict[str, Any]:
    need(hf, "hidden_activation", "gelu_pytorch_tanh")
    scalar, size = need(hf, "query_pre_attn_scalar"), need(hf, "head_dim")
    names = hf.get("layer_types") or [
        SLIDING if (n + 1) % every else FULL for n in range(need(hf, "num_hidden_layers"))
    ]
    names = layer_names(hf, names, (SLIDING, FULL))
    own = rotations({**hf, "layer_types": names}, by_kind=by_kind)
    return {
        **sizes(hf),
        **layered(own, names, need(hf, "sliding_window")),
        "mlp": "geglu",
        "norm": "rms",
        "norm_eps": need(hf, "rms_norm_eps"),
        "post_norm": True,
        "biases": ATTENTION_AND_MLP[bool(hf.get("attention_bias")), False],
        "embed_scale": float(need(hf, "hidden_size")) ** 0.5,
        "score_scale": 0.0 if scalar == size else float(scalar) ** -0.5,
        "logit_cap": float(hf.get("final_logit_softcapping") or 0),
    }


def write_gemma2(spec: ModelSpec, length: int) -> Config:
    layer = spec.layers[0]
    cap = {"attn_logit_softcapping": layer.score_cap or None}
    return {"model_type": "gemma2", **_shared_to_hf(spec, length), **cap}


def write_gemma3(spec: ModelSpec, length: int) -> Config:
    hf = {"model_type": "gemma3_text", **_shared_to_hf(spec, length)}
    rope = hf["rope_parameters"]
    if "rope_type" in rope:  # one for all layers; Gemma 3 has it by type
        hf["rope_parameters"] = {SLIDING: rope, FULL: rope}
    return hf


def _shared_to_hf(spec: ModelSpec, length: int) -> Config:
    layer, (names, window, rope) = spec.layers[0], layers_to_hf(spec)
    if "rope_parameters" not in rope:
        raise ConfigError(f"positions are {type(spec.positions).__name__}, it has RoPE")
    return {
        **sizes_to_hf(spec, length),
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": spec.norm_eps,
        "attention_bias": layer.biases == "attention",
        "query_pre_attn_scalar": _scalar(layer.score_scale) or layer.head_size,
        "final_logit_softcapping": spec.logit_cap or None,
        "sliding_window": window or length,
        "layer_types": names,
        **rope,
    }


def _scalar(scale: float) -> float:
    """What the inverse square root of is the scale; whole where that gives it exactly."""
    scalar = scale**-2 if scale else 0
    return round(scalar) if round(scalar) and round(scalar) ** -0.5 == scale else scalar


DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
OUTSIDE = (
    ("model.embed_tokens.weight", "embedding/table", SAME),
    ("model.norm.weight", "final_norm/scale", ONE_LESS),
    ("lm_head.weight", "head/kernel", LINEAR),
)
NORMS = (
    ("model.layers.{n}.input_layernorm.weight", "mixer_norm/scale", ONE_LESS),
    ("model.layers.{n}.post_attention_layernorm.weight", "mixer_post_norm/scale", ONE_LESS),
    ("model.layers.{n}.pre_feedforward_layernorm.weight", "mlp_norm/scale", ONE_LESS),
    ("model.layers.{n}.post_feedforward_layernorm.weight", "mlp_post_norm/scale", ONE_LESS),
)
QK_NORMS = (
    ("model.layers.{n}.self_attn.q_norm.weight", "mixer/q_norm/scale", ONE_LESS),
    ("model.layers.{n}.self_attn.k_norm.weight", "mixer/k_norm/scale", ONE_LESS),
)
WEIGHTS = weights(*OUTSIDE, *llama.ATTENTION, *llama.MLP, *NORMS)
GEMMA2 = Family(
    types={"gemma2": "Gemma2ForCausalLM"},
    read=read_gemma2,
    write=write_gemma2,
    defaults={
        **DEFAULTS,
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "sliding_window_pattern": 2,
        "rope_theta": 10_000.0,
    },
    weights=WEIGHTS,
    harmless=(llama.ROTATIONS,),
)
GEMMA3 = Family(
    types={"gemma3_text": "Gemma3ForCausalLM", "gemma3": "Gemma3ForConditionalGeneration"},
    read=read_gemma3,
    write=write_gemma3,
    defaults={
        **DEFAULTS,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
    weights=(*WEIGHTS, *weights(*QK_NORMS)),
    # The text part of a model that sees, as transformers 4 and 5 name it.
    renamed=(
        (r"^language_model\.(model|lm_head)\.", r"\1."),
        (r"^model\.language_model\.", "model."),
    ),
    harmless=(r"(^|\.)(vision_tower|multi_modal_projector)\.", llama.ROTATIONS),
)
