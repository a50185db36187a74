"""Qwen 2 and 2.5, with biases of q, k and v, and Qwen 3, with norms of q and k."""

from typing import Any

from lcm.models import ModelSpec
from lcm.pretrained.families import llama
from lcm.pretrained.families.base import (
    ATTENTION_AND_MLP,
    FULL,
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


def read_qwen2(hf: Config) -> dict[str, Any]:
    return {**_shared(hf), "biases": "qkv"}


def read_qwen3(hf: Config) -> dict[str, Any]:
    bias = bool(hf.get("attention_bias"))
    return {**_shared(hf), "qk_norm": True, "biases": ATTENTION_AND_MLP[bias, False]}


def _shared(hf: Config) -> dict[str, Any]:
    need(hf, "hidden_act", "silu")
    window = need(hf, "sliding_window") if hf.get("use_sliding_window") else 0
    names = _names(hf)
    return {
        **sizes(hf),
        **layered(rotations(hf), names if window else [FULL], window),
        "mlp": "swiglu",
        "norm": "rms",
        "norm_eps": need(hf, "rms_norm_eps"),
    }


def _names(hf: Config) -> list[str]:
    """The first `max_window_layers` see all."""
    if hf.get("layer_types"):
        return layer_names(hf, hf["layer_types"], (SLIDING, FULL))
    wide, depth = need(hf, "max_window_layers"), need(hf, "num_hidden_layers")
    return [FULL if n < wide else SLIDING for n in range(depth)]


def write_qwen2(spec: ModelSpec, length: int) -> Config:
    return {"model_type": "qwen2", **_shared_to_hf(spec, length)}


def write_qwen3(spec: ModelSpec, length: int) -> Config:
    bias = spec.layers[0].biases == "attention"
    return {"model_type": "qwen3", "attention_bias": bias, **_shared_to_hf(spec, length)}


def _shared_to_hf(spec: ModelSpec, length: int) -> Config:
    names, window, rope = layers_to_hf(spec)
    return {
        **sizes_to_hf(spec, length),
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "use_sliding_window": window > 0,
        "sliding_window": window or None,
        "layer_types": names,
        **rope,
    }


DEFAULTS = {
    **llama.LLAMA.defaults,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QK_NORMS = (
    ("model.layers.{n}.self_attn.q_norm.weight", "mixer/q_norm/scale", SAME),
    ("model.layers.{n}.self_attn.k_norm.weight", "mixer/k_norm/scale", SAME),
)
QWEN2 = Family(
    types={"qwen2": "Qwen2ForCausalLM"},
    read=read_qwen2,
    write=write_qwen2,
    defaults=DEFAULTS,
    weights=llama.LLAMA.weights,
    harmless=(llama.ROTATIONS,),
)
QWEN3 = Family(
    types={"qwen3": "Qwen3ForCausalLM"},
    read=read_qwen3,
    write=write_qwen3,
    defaults={**DEFAULTS, "head_dim": 128},
    weights=(*llama.LLAMA.weights, *weights(*QK_NORMS)),
)
