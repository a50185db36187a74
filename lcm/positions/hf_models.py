"""What Hugging Face models do where their config is silent, and older names of its keys."""

from typing import Any

_TABLE = {"position_embedding_type": "absolute"}

# Keys that mean the same.
ALIASES = {
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
    "rope_pct": "partial_rotary_factor",
    "n_positions": "max_position_embeddings",
    "max_seq_len": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "bloom": {"alibi": True},
    "mpt": {"alibi": True, **_TABLE, "max_position_embeddings": 2048},
    "falcon": {"rope_theta": 10_000.0},
    "llama": {"rope_theta": 10_000.0},
    "gptj": {"rope_theta": 10_000.0, "rotary_dim": 64},
    "gpt_neox": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
    "gpt2": {**_TABLE, "max_position_embeddings": 1024},
    "gpt_neo": {**_TABLE, "max_position_embeddings": 2048},
    "gpt_bigcode": {**_TABLE, "max_position_embeddings": 1024},
    "opt": {**_TABLE, "max_position_embeddings": 2048},
    "t5": {"relative_attention_num_buckets": 32},
    "mt5": {"relative_attention_num_buckets": 32},
    "gemma3_text": {"sliding_window_pattern": 6},
    "cohere2": {"sliding_window_pattern": 4},
    "granitemoehybrid": {"position_embedding_type": "nope"},
    "smollm3": {"no_rope_layer_interval": 4},
    "llama4_text": {
        "rope_theta": 500_000.0,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
    },
}
# Models whose pairs are (2i, 2i + 1); others say so by rope_interleave, or have rotate-half.
INTERLEAVED = frozenset(
    (
        *("codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5", "ernie4_5_moe"),
        *("glm", "glm4", "glm4_moe_lite", "gptj", "helium", "llama4_text", "mistral4", "roformer"),
    )
)
# Models whose layers without a window have no rotation.
ROTATED_IN_WINDOWS = ("cohere2", "exaone4")
