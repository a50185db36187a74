"""RecurrentGemma (arXiv:2404.07839): recurrent blocks and layers of local attention."""

from typing import Any

import ml_dtypes
import numpy as np

from lcm import positions
from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.pretrained.families.base import (
    FULL,
    LINEAR,
    ONE_LESS,
    SAME,
    Config,
    Family,
    Form,
    Weight,
    by_mixer,
    key_of,
    need,
    rotations,
    sizes,
    sizes_to_hf,
    weights,
)

MIXERS = {"recurrent": "rglru", "attention": "attention"}
BIASES = {False: "but_qkv", True: "all"}
# Biases of the blocks of a matrix, [H, M / H].
BLOCKS = Form(
    lambda tensor, *_: [tensor.reshape(-1)],
    lambda ours, layer: ours[0].reshape(layer.heads, -1),
)


def read(hf: Config) -> dict[str, Any]:
    need(hf, "hidden_activation", "gelu_pytorch_tanh")
    own, pattern = sizes(hf), tuple(need(hf, "block_types"))
    for name in pattern:
        if name not in MIXERS:
            raise ConfigError(f"block_types has {name!r}, which is none of {', '.join(MIXERS)}")
    if own["hidden"] % 2:
        raise ConfigError(f"intermediate_size={own['hidden']} is odd: it counts two matrices")
    inner = hf.get("lru_width") or own["width"]
    recurrent = {"mixer": "rglru", "expand": inner / own["width"], "conv": hf["conv1d_width"]}
    recurrent["head_size"] = inner // own["heads"]
    attention = {"mixer": "attention", "window": need(hf, "attention_window_size")}
    kinds = {"recurrent": recurrent, "attention": attention}
    pattern = pattern[: own["depth"]]
    return {
        **own,
        "hidden": own["hidden"] // 2,
        "head_size": own["width"] // own["heads"],
        "pattern": pattern,
        "kinds": {name: kinds[name] for name in dict.fromkeys(pattern)},
        "positions": positions.config(rotations(hf, partial=True)[FULL]),
        "mlp": "geglu",
        "norm": "rms",
        "norm_eps": need(hf, "rms_norm_eps"),
        "biases": BIASES[bool(hf.get("attention_bias"))],
        "embed_scale": _scale(own["width"]),
        "logit_cap": float(hf.get("logits_soft_cap") or 0),
    }


def _scale(width: int) -> float:
    """The root of the width, rounded as they round it."""
    return float(np.sqrt(np.float32(width)).astype(ml_dtypes.bfloat16))


def write(spec: ModelSpec, length: int) -> Config:
    found = by_mixer(spec, ["rglru", "attention"])
    recurrent, attention = found["rglru"], found["attention"]
    return {
        "model_type": "recurrent_gemma",
        **sizes_to_hf(spec, length),
        **positions.to_hf(attention.positions, spec.depth),
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_size,
        "intermediate_size": 2 * attention.hidden,
        "lru_width": recurrent.inner,
        "conv1d_width": recurrent.conv,
        "attention_window_size": attention.window,
        "block_types": [key_of(MIXERS, layer.mixer) for layer in spec.layers],
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": spec.norm_eps,
        "attention_bias": attention.biases == "all",
        "logits_soft_cap": spec.logit_cap,
    }


LAYER = "model.layers.{n}"
BLOCK = f"{LAYER}.temporal_block"
_OUT = tuple(
    Weight(f"{BLOCK}.{name}.{kind}", (path,), LINEAR, mixer)
    for name, mixer in (("linear_out", "rglru"), ("o_proj", "attention"))
    for kind, path in (("weight", "mixer/out"), ("bias", "mixer/out_bias"))
)
RECURRENT_GEMMA = Family(
    types={"recurrent_gemma": "RecurrentGemmaForCausalLM"},
    read=read,
    write=write,
    defaults={
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "num_attention_heads": 10,
        "conv1d_width": 4,
        "attention_window_size": 2048,
        "logits_soft_cap": 30.0,
        "block_types": ["recurrent", "recurrent", "attention"],
        "tie_word_embeddings": True,
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5,
        "seq_length": 8192,  # of the releases; no config says
    },
    weights=(
        *weights(
            ("model.embed_tokens.weight", "embedding/table", SAME),
            ("lm_head.weight", "head/kernel", LINEAR),
            (f"{BLOCK}.linear_x.weight", "mixer/x", LINEAR),
            (f"{BLOCK}.linear_y.weight", "mixer/y", LINEAR),
            (f"{BLOCK}.conv_1d.weight", "mixer/conv", LINEAR),
            (f"{BLOCK}.q_proj.weight", "mixer/q", LINEAR),
            (f"{BLOCK}.k_proj.weight", "mixer/k", LINEAR),
            (f"{BLOCK}.v_proj.weight", "mixer/v", LINEAR),
            (f"{LAYER}.mlp_block.gate_proj.weight", "mlp/gate", LINEAR),
            (f"{LAYER}.mlp_block.up_proj.weight", "mlp/up", LINEAR),
            (f"{LAYER}.mlp_block.down_proj.weight", "mlp/down", LINEAR),
        ),
        *_OUT,
        Weight(f"{BLOCK}.rg_lru.recurrent_param", ("mixer/a_param",), SAME),
        Weight(f"{BLOCK}.rg_lru.recurrent_gate_weight", ("mixer/recurrence",), SAME),
        Weight(f"{BLOCK}.rg_lru.recurrent_gate_bias", ("mixer/recurrence_bias",), BLOCKS),
        Weight(f"{BLOCK}.rg_lru.input_gate_weight", ("mixer/input",), SAME),
        Weight(f"{BLOCK}.rg_lru.input_gate_bias", ("mixer/input_bias",), BLOCKS),
        Weight("model.final_norm.weight", ("final_norm/scale",), ONE_LESS),
        Weight(f"{LAYER}.temporal_pre_norm.weight", ("mixer_norm/scale",), ONE_LESS),
        Weight(f"{LAYER}.channel_pre_norm.weight", ("mlp_norm/scale",), ONE_LESS),
    ),
    harmless=(r"\.rotary_emb\.inv_freq$", r"^model\.normalizer$"),
)
