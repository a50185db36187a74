"""Llama 2 and 3, SmolLM2 and Mistral."""

from typing import Any

from lcm.models import ModelSpec
from lcm.pretrained.families.base import (
    ATTENTION_AND_MLP,
    FULL,
    LINEAR,
    SAME,
    SLIDING,
    Config,
    Family,
    key_of,
    layered,
    layers_to_hf,
    need,
    rotations,
    sizes,
    sizes_to_hf,
    weights,
)

ENDS = (
    ("model.embed_tokens.weight", "embedding/table", SAME),
    ("model.norm.weight", "final_norm/scale", SAME),
    ("lm_head.weight", "head/kernel", LINEAR),
)
ATTENTION = (
    ("model.layers.{n}.self_attn.q_proj.weight", "mixer/q", LINEAR),
    ("model.layers.{n}.self_attn.k_proj.weight", "mixer/k", LINEAR),
    ("model.layers.{n}.self_attn.v_proj.weight", "mixer/v", LINEAR),
    ("model.layers.{n}.self_attn.o_proj.weight", "mixer/out", LINEAR),
)
MLP = (
    ("model.layers.{n}.mlp.gate_proj.weight", "mlp/gate", LINEAR),
    ("model.layers.{n}.mlp.up_proj.weight", "mlp/up", LINEAR),
    ("model.layers.{n}.mlp.down_proj.weight", "mlp/down", LINEAR),
)
NORMS = (
    ("model.layers.{n}.input_layernorm.weight", "mixer_norm/scale", SAME),
    ("model.layers.{n}.post_attention_layernorm.weight", "mlp_norm/scale", SAME),
)
# Tables of rotations, which the first checkpoints hold.
ROTATIONS = r"\.rotary_emb\.inv_freq$"


def read(hf: Config) -> dict[str, Any]:
    need(hf, "hidden_act", "silu")
    window = (hf.get("sliding_window") or 0) if hf["model_type"] == "mistral" else 0
    biases = bool(hf.get("attention_bias")), bool(hf.get("mlp_bias"))
    return {
        **sizes(hf),
        **layered(rotations(hf), [SLIDING if window else FULL], window),
        "mlp": "swiglu",
        "norm": "rms",
        "norm_eps": need(hf, "rms_norm_eps"),
        "biases": ATTENTION_AND_MLP[biases],
    }


def write(spec: ModelSpec, length: int) -> Config:
    layer = spec.layers[0]
    _, window, rope = layers_to_hf(spec)
    # Llama has no window, and heads that divide the width.
    mistral = window or spec.width % layer.heads
    attention, mlp = key_of(ATTENTION_AND_MLP, layer.biases)
    own = {"sliding_window": window or None} if mistral else {}
    return {
        "model_type": "mistral" if mistral else "llama",
        **sizes_to_hf(spec, length),
        **({} if mistral else {"attention_bias": attention, "mlp_bias": mlp}),
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        **rope,
        **own,
    }


LLAMA = Family(
    types={"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"},
    read=read,
    write=write,
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,  # of Mistral
    },
    weights=weights(*ENDS, *ATTENTION, *MLP, *NORMS),
    harmless=(ROTATIONS,),
)
