"""Tiny models of every family: their configs as Hugging Face has them, and weights by name.

Weights follow from the name of a tensor alone, so that a golden file holds logits and shapes only.
Windows are shorter than LENGTH, and so is what each model was trained on.
"""

import json
import pathlib
import re
import zlib
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

VOCAB, LENGTH, SHORT, TRAINED, WINDOW = 61, 40, 5, 16, 7
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def model(kind: str, **keys: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": TRAINED,
        "tie_word_embeddings": False,
    }
    return {"model_type": kind, **sizes, **ENDS, **keys}


def rope(kind: str, **keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **keys}}


def gemma(kind: str, **keys: Any) -> dict[str, Any]:
    own = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
    return model(kind, num_hidden_layers=3, **{**own, "tie_word_embeddings": True, **keys})


def recurrent(kind: str, **keys: Any) -> dict[str, Any]:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
    return {"model_type": kind, **sizes, **ENDS, **keys}


def delta(kind: str, **keys: Any) -> dict[str, Any]:
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 16}
    heads = {"linear_key_head_dim": 8, "linear_value_head_dim": 12}
    layers = {"num_hidden_layers": 3, "layer_types": MIXED}
    return model(kind, **{**layers, **sizes, **heads, **keys})


def olmo_hybrid(**keys: Any) -> dict[str, Any]:
    """As many channels of keys as of values: transformers writes taps in three equal parts."""
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    heads = {"linear_key_head_dim": 16, "linear_value_head_dim": 8}
    layers = {"num_hidden_layers": 3, "layer_types": MIXED}
    return model("olmo_hybrid", **{**layers, **sizes, **heads, **keys})


def granite(**keys: Any) -> dict[str, Any]:
    """Without experts; all factors away from 1."""
    mamba = {"mamba_n_heads": 8, "mamba_d_state": 6, "mamba_chunk_size": 16}
    sizes = {"num_hidden_layers": 3, "shared_intermediate_size": 40, "num_local_experts": 0}
    factors = {"embedding_multiplier": 3, "residual_multiplier": 0.4, "logits_scaling": 1.5}
    return model("granitemoehybrid", **{**sizes, **mamba, **factors, **keys})


def jamba(**keys: Any) -> dict[str, Any]:
    """Mamba, attention, Mamba; experts in every second layer, the first of them."""
    turns = {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_offset": 0}
    own = {"expert_layer_period": 2, "mamba_d_state": 4, "num_hidden_layers": 3}
    return model("jamba", **{**own, **turns, **keys})


def kimi_linear(**keys: Any) -> dict[str, Any]:
    """One MLP in the first layer, experts in the others; no two sizes alike."""
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 12}
    delta = {"linear_head_dim": 10, "linear_num_heads": 3, "layer_types": MIXED}
    chosen = {"num_experts": 5, "num_experts_per_token": 2, "num_shared_experts": 2}
    own = {"num_hidden_layers": 3, "num_key_value_heads": 4, "moe_intermediate_size": 20}
    made = model("kimi_linear", **{**own, **heads, **delta, **chosen, **keys})
    return {**made, "model_max_length": made.pop("max_position_embeddings")}


def lfm2(**keys: Any) -> dict[str, Any]:
    """Two thirds of 48 times 1.1 is 35, which is rounded up to 40."""
    layers = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    hidden = {"block_ffn_dim_multiplier": 1.1, "block_multiple_of": 8, "tie_word_embeddings": True}
    return model("lfm2", **{**layers, **hidden, **rope("default"), **keys})


def lfm2_moe(**keys: Any) -> dict[str, Any]:
    """One MLP in the first layer, experts in the others."""
    layers = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    chosen = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    own = {"num_dense_layers": 1, "tie_word_embeddings": True, **rope("default")}
    return model("lfm2_moe", **{**layers, **chosen, **own, **keys})


def zamba(*names: str, **keys: Any) -> dict[str, Any]:
    mamba = {"n_mamba_heads": 4, "mamba_d_state": 8, "chunk_size": 16}
    own = {"num_key_value_heads": 4, "adapter_rank": 3, "layers_block_type": list(names), **mamba}
    own["tie_word_embeddings"] = True
    return model("zamba2", num_hidden_layers=len(names), **own, **keys)


BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": TRAINED}
FACTORS = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 2.5, 4.0]}
TYPES = ["sliding_attention", "sliding_attention", "full_attention"]
WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
PLAIN = {"rope_type": "default"}
MIXED = ["linear_attention", "full_attention", "linear_attention"]

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": model("llama", rope_theta=100.0),
    "llama, biases, tied": model(
        "llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_theta=1e4
    ),
    "llama, linear": model("llama", **rope("linear", factor=2.5)),
    "llama, dynamic": model("llama", **rope("dynamic", factor=2.0)),
    "llama, yarn": model("llama", **rope("yarn", factor=4.0, **ORIGINAL)),
    "llama, llama3": model("llama", **rope("llama3", factor=8.0, **BANDS, **ORIGINAL)),
    "mistral": model("mistral", head_dim=16, sliding_window=WINDOW, rope_theta=100.0),
    "qwen2": model("qwen2", rope_theta=100.0, **WINDOWS, num_hidden_layers=3),
    "qwen2, yarn": model("qwen2", tie_word_embeddings=True, **rope("yarn", factor=2.0, **ORIGINAL)),
    "qwen3": model("qwen3", head_dim=16, rope_theta=100.0),
    "qwen3, biases": model("qwen3", head_dim=8, attention_bias=True, **rope("default"), **WINDOWS),
    "gemma2": gemma("gemma2", rope_theta=100.0, attn_logit_softcapping=5.0),
    "gemma3": gemma(
        "gemma3_text",
        rope_parameters={
            "sliding_attention": {**PLAIN, "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
        },
        layer_types=TYPES,
    ),
    "phi3": model("phi3", sliding_window=WINDOW, rope_theta=100.0),
    "phi3, longrope": model(
        "phi3",
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.75,
            **FACTORS,
        },
        original_max_position_embeddings=TRAINED,
        tie_word_embeddings=True,
    ),
    "gpt_neox": model(
        "gpt_neox", rotary_pct=0.5, rotary_emb_base=100, num_key_value_heads=4, hidden_act="gelu"
    ),
    "gpt_neox, sequential": model(
        "gpt_neox",
        use_parallel_residual=False,
        attention_bias=False,
        hidden_act="gelu_new",
        **rope("linear", factor=2.0, partial_rotary_factor=0.25),
    ),
    "bloom": {
        "model_type": "bloom",
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "n_layer": 2,
        "n_head": 6,
        **ENDS,
    },
    "mpt": {
        "model_type": "mpt",
        "vocab_size": VOCAB,
        "d_model": 24,
        "n_layers": 2,
        "n_heads": 6,
        "max_seq_len": 64,
        **ENDS,
    },
    "mamba": recurrent("mamba", state_size=4),
    "mamba, rank": recurrent("mamba", state_size=4, time_step_rank=5, tie_word_embeddings=False),
    "falcon_mamba": recurrent(
        "falcon_mamba",
        state_size=4,
        time_step_rank=5,
        tie_word_embeddings=False,
        mixer_rms_eps=0.05,  # far from that of the other norms
    ),
    "mamba2": recurrent(
        "mamba2", state_size=8, num_heads=4, head_dim=16, n_groups=2, chunk_size=16
    ),
    "recurrent_gemma": model(
        "recurrent_gemma",
        num_hidden_layers=5,
        attention_window_size=WINDOW,
        lru_width=48,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    ),
    "zamba2": zamba("mamba", "hybrid", "hybrid"),
    "zamba2, blocks": zamba(
        *("hybrid", "hybrid", "hybrid"),
        num_mem_blocks=2,
        mamba_ngroups=2,
        use_mem_rope=True,
        use_shared_attention_adapter=True,
        hidden_act="silu",
        time_step_min=0.3,  # most steps are shorter
        **rope("default"),
    ),
    "qwen3_next": delta("qwen3_next", num_experts=0, hidden_size=48, **rope("default")),
    "qwen3_next, experts": delta(
        "qwen3_next",
        num_hidden_layers=2,
        layer_types=MIXED[:2],
        hidden_size=48,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        **rope("default"),
    ),
    "jamba": jamba(num_experts=1),
    "jamba, experts": jamba(num_experts=4),
    "olmo_hybrid": olmo_hybrid(rope_parameters={**PLAIN, "rope_theta": None}, rms_norm_eps=0.05),
    "olmo_hybrid, rope": olmo_hybrid(
        linear_allow_neg_eigval=False,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        **rope("default"),
    ),
    "bamba": model(
        "bamba",
        num_hidden_layers=3,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_state=6,
        mamba_n_groups=2,
        mamba_chunk_size=16,
        **rope("default"),
    ),
    "granite": granite(
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        position_embedding_type="nope",
        attention_multiplier=0.7,
    ),
    "granite, rope": granite(
        layer_types=["full_attention"] * 3,
        position_embedding_type="rope",
        attention_multiplier=8**-0.5,
        tie_word_embeddings=True,
        **rope("default"),
    ),
    "xlstm": recurrent(
        "xlstm", num_heads=4, v_dim_factor=1.5, ffn_round_up_to_multiple_of=8, gate_soft_cap=5.0
    ),
    "qwen3_5": delta("qwen3_5_text", tie_word_embeddings=True),
    "kimi_linear": kimi_linear(rms_norm_eps=0.05),  # far from that of latents
    "kimi_linear, query rank": kimi_linear(
        num_hidden_layers=2,
        layer_types=MIXED[:2],
        mlp_layer_types=["sparse", "dense"],
        q_lora_rank=7,
        moe_renormalize=False,
        num_shared_experts=1,
        routed_scaling_factor=0.8,
    ),
    "lfm2": lfm2(),
    "lfm2, biases": lfm2(
        num_hidden_layers=2,
        layer_types=None,
        full_attn_idxs=[0],
        conv_bias=True,
        conv_L_cache=4,
        head_dim=16,
        block_auto_adjust_ff_dim=False,
        norm_eps=0.05,
        tie_word_embeddings=False,
    ),
    "lfm2_moe": lfm2_moe(routed_scaling_factor=0.8),
    "lfm2_moe, all": lfm2_moe(
        num_hidden_layers=2,
        layer_types=["full_attention", "conv"],
        num_dense_layers=0,
        use_expert_bias=False,
        norm_topk_prob=False,
        tie_word_embeddings=False,
    ),
}
# Second cases of families that have one among the others.
SECOND = ("olmo_hybrid, rope", "granite, rope", "kimi_linear, query rank")
SECOND += ("lfm2, biases", "lfm2_moe, all")
# Their frequencies follow the tokens that are there: what a cache holds was made under others.
BY_LENGTH = ("llama, dynamic", "phi3, longrope")


def tokens(length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(length).integers(0, VOCAB, (2, length))


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor of a name: large enough that attention is not flat, norms not one."""
    random = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    x = random.standard_normal(shape, np.float32)
    if len(shape) > 1:
        # Where a gate of RecurrentGemma is all but closed, a^2 is next to 1, and transformers'
        # float32 `1 - a^2` is 8e-4 away from its own float64 in the logits. A block of Zamba2,
        # which has no residuals, puts it 2e-2 away.
        most = 0.3 if re.search(r"gate_weight$|\.shared_transformer\.|\.linear\.", name) else 1.5
        return x * np.float32(most * shape[-1] ** -0.5)
    return 0.3 * x + np.float32(name.endswith("weight"))


def write(
    folder: pathlib.Path, config: dict, shapes: dict, dtype: str = "float32", shards: int = 1
) -> pathlib.Path:
    """A folder with the tensors of these shapes, in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    made = {n: np.ascontiguousarray(tensor(n, tuple(s)).astype(kind)) for n, s in shapes.items()}
    if shards == 1:
        save_file(made, folder / "model.safetensors")
        return folder
    home = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(made)}
    for file in set(home.values()):
        save_file({n: x for n, x in made.items() if home[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
