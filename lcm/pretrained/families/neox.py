"""GPT-NeoX and Pythia: LayerNorm, biases, parallel residuals, a quarter of a head rotated."""

from typing import Any

from lcm.models import ModelSpec
from lcm.pretrained.families.base import (
    BY_HEAD,
    FULL,
    LINEAR,
    SAME,
    Config,
    Family,
    choose,
    key_of,
    layered,
    layers_to_hf,
    need,
    rotations,
    sizes,
    sizes_to_hf,
    weights,
)

GELUS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu"}
BIASES = {True: "all", False: "mlp"}


def read(hf: Config) -> dict[str, Any]:
    return {
        **sizes({**hf, "head_dim": 0, "num_key_value_heads": 0}),
        **layered(rotations(hf, partial=True), [FULL], 0),
        "mlp": choose(hf, "hidden_act", GELUS),
        "norm": "layer",
        "norm_eps": need(hf, "layer_norm_eps"),
        "biases": choose(hf, "attention_bias", BIASES),
        "parallel": bool(need(hf, "use_parallel_residual")),
    }


def write(spec: ModelSpec, length: int) -> Config:
    layer = spec.layers[0]
    return {
        "model_type": "gpt_neox",
        **sizes_to_hf(spec, length),
        "hidden_act": key_of(GELUS, layer.mlp),
        "layer_norm_eps": spec.norm_eps,
        "attention_bias": key_of(BIASES, layer.biases),
        "use_parallel_residual": layer.parallel,
        **layers_to_hf(spec)[2],
    }


LAYER = "gpt_neox.layers.{n}"
GPT_NEOX = Family(
    types={"gpt_neox": "GPTNeoXForCausalLM"},
    read=read,
    write=write,
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "attention_bias": True,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    },
    weights=weights(
        ("gpt_neox.embed_in.weight", "embedding/table", SAME),
        ("gpt_neox.final_layer_norm.weight", "final_norm/scale", SAME),
        ("embed_out.weight", "head/kernel", LINEAR),
        (f"{LAYER}.attention.query_key_value.weight", "mixer/q mixer/k mixer/v", BY_HEAD),
        (f"{LAYER}.attention.dense.weight", "mixer/out", LINEAR),
        (f"{LAYER}.mlp.dense_h_to_4h.weight", "mlp/up", LINEAR),
        (f"{LAYER}.mlp.dense_4h_to_h.weight", "mlp/down", LINEAR),
        (f"{LAYER}.input_layernorm.weight", "mixer_norm/scale", SAME),
        (f"{LAYER}.post_attention_layernorm.weight", "mlp_norm/scale", SAME),
    ),
    renamed=((r"^lm_head\.", "embed_out."),),
    harmless=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
)
