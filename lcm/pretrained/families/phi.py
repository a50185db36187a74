"""Phi-3, Phi-3.5 and Phi-4 mini: Llama with fused matrices, LongRoPE, partial rotation."""

from typing import Any

from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.positions import LongRoPE, RoPE
from lcm.pretrained.families import llama
from lcm.pretrained.families.base import (
    FULL,
    FUSED,
    LINEAR,
    SLIDING,
    Config,
    Family,
    layered,
    layers_to_hf,
    need,
    rotations,
    sizes,
    sizes_to_hf,
    weights,
)


def read(hf: Config) -> dict[str, Any]:
    need(hf, "hidden_act", "silu")
    window, own = hf.get("sliding_window") or 0, rotations(hf, partial=True)
    if type(own[FULL]) not in (RoPE, LongRoPE):
        raise ConfigError(f"positions are {own[FULL]}, it has RoPE and LongRoPE")
    return {
        **sizes({**hf, "head_dim": 0}),
        **layered(own, [SLIDING if window else FULL], window),
        "mlp": "swiglu",
        "norm": "rms",
        "norm_eps": need(hf, "rms_norm_eps"),
    }


def write(spec: ModelSpec, length: int) -> Config:
    _, window, rope = layers_to_hf(spec)
    hf = {
        "model_type": "phi3",
        **sizes_to_hf(spec, length),
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "sliding_window": window or None,
        **rope,
    }
    original = hf.get("rope_parameters", {}).get("original_max_position_embeddings")
    return {**hf, "original_max_position_embeddings": original or length}


PHI3 = Family(
    types={"phi3": "Phi3ForCausalLM"},
    read=read,
    write=write,
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 4096,
    },
    weights=weights(
        *llama.ENDS,
        ("model.layers.{n}.self_attn.qkv_proj.weight", "mixer/q mixer/k mixer/v", FUSED),
        ("model.layers.{n}.self_attn.o_proj.weight", "mixer/out", LINEAR),
        ("model.layers.{n}.mlp.gate_up_proj.weight", "mlp/gate mlp/up", FUSED),
        ("model.layers.{n}.mlp.down_proj.weight", "mlp/down", LINEAR),
        *llama.NORMS,
    ),
    harmless=(llama.ROTATIONS,),
)
