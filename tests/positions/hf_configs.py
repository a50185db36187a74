"""Positions in `config.json` files of Hugging Face: shapes of released models, and each option.

Values are those of the releases named, as far as positions go; names without a release reach an
option that none of them has.
"""

from typing import Any, NamedTuple


class Case(NamedTuple):
    """kind: the kind of layer that is compared, where they differ."""

    config: dict[str, Any]
    size: int
    trained: int
    kind: str | None


def case(model, size=128, trained=4096, kind=None, **keys) -> Case:
    return Case({**model, **keys}, size, trained, kind)


def model(kind, width, heads, longest=4096, **keys):
    sizes = {"hidden_size": width, "num_attention_heads": heads, "max_position_embeddings": longest}
    return {"model_type": kind, **sizes, **keys}


def yarn(factor=4.0, original=4096, **options):
    lengths = {"factor": factor, "original_max_position_embeddings": original}
    return {"rope_type": "yarn", **lengths, **options}


def llama3(factor):
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "rope_type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": 8192,
        **bands,
    }


# As many factors as Phi-3 has, simpler numbers.
FACTORS = {
    "short_factor": [1.0 + 0.01 * i for i in range(48)],
    "long_factor": [1.0 + 0.04 * i * i for i in range(48)],
}
MILLION = 1_000_000.0
LLAMA = model("llama", 4096, 32)
THREE = model("llama", 4096, 32, 131072, rope_theta=500_000.0)
QWEN = model("qwen2", 3584, 28, 32768, rope_theta=MILLION)
PHI = model("phi3", 3072, 32, 131072, original_max_position_embeddings=4096, pad_token_id=0)
GEMMA = model("gemma3_text", 2560, 8, 131072, head_dim=256, num_hidden_layers=8)
GEMMA["layer_types"] = [*["sliding_attention"] * 5, "full_attention", *["sliding_attention"] * 2]
DEEP = {"size": 64, "head_dim": 64}

CONFIGS: dict[str, Case] = {
    "Llama 2": case(LLAMA, rope_theta=10_000.0),
    "Llama 3": case(LLAMA, trained=8192, rope_theta=500_000.0),
    "Llama 3.1": case(THREE, trained=8192, rope_scaling=llama3(8.0)),
    "Llama 3.2": case(THREE, 64, 8192, hidden_size=2048, rope_scaling=llama3(32.0)),
    "llama3 in transformers 5": case(
        LLAMA, trained=8192, rope_parameters={**llama3(8.0), "rope_theta": 500_000.0}
    ),
    "PI": case(LLAMA, rope_scaling={"type": "linear", "factor": 4.0}),
    "PI of half a head": case(
        LLAMA, partial_rotary_factor=0.5, rope_scaling={"type": "linear", "factor": 8.0}
    ),
    "dynamic, factor 2": case(LLAMA, rope_scaling={"type": "dynamic", "factor": 2.0}),
    "dynamic, factor 1": case(LLAMA, rope_scaling={"rope_type": "dynamic", "factor": 1.0}),
    "dynamic of a quarter": case(
        LLAMA,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "partial_rotary_factor": 0.25},
    ),
    "Qwen 2.5": case(
        QWEN,
        trained=32768,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "YaRN, Llama 2 at 64k": case(LLAMA, rope_scaling={**yarn(16.0), "finetuned": True}),
    "YaRN, factor of lengths": case(
        LLAMA, max_position_embeddings=32768, rope_scaling=yarn(factor=None)
    ),
    "YaRN, factor 1": case(LLAMA, rope_scaling=yarn(1.0)),
    "YaRN, not rounded": case(LLAMA, rope_scaling=yarn(truncate=False)),
    "YaRN, own amplitude": case(LLAMA, rope_scaling=yarn(attention_factor=1.25)),
    "YaRN, own turns": case(LLAMA, rope_scaling=yarn(beta_fast=16.0, beta_slow=2.0)),
    "YaRN of half a head": case(LLAMA, partial_rotary_factor=0.5, rope_scaling=yarn(8.0)),
    "YaRN, 64 tokens": case(LLAMA, trained=64, rope_scaling=yarn(original=64)),
    "YaRN, one mscale": case(LLAMA, rope_scaling=yarn(mscale=0.7)),
    "DeepSeek V2": case(LLAMA, **DEEP, rope_scaling=yarn(40, mscale=0.707, mscale_all_dim=0.707)),
    "two mscales": case(LLAMA, **DEEP, rope_scaling=yarn(40, mscale=1.0, mscale_all_dim=0.8)),
    "Phi-3 mini 128k": case(
        PHI, 96, rope_theta=10_000.0, rope_scaling={"type": "longrope", **FACTORS}
    ),
    "Phi-3, own amplitude": case(
        PHI, 96, rope_scaling={"type": "longrope", "attention_factor": 1.19, **FACTORS}
    ),
    "LongRoPE with a factor": case(
        LLAMA,
        96,
        2048,
        head_dim=96,
        rope_scaling={
            "rope_type": "longrope",
            "factor": 8.0,
            "original_max_position_embeddings": 2048,
            **FACTORS,
        },
    ),
    "p-RoPE": case(
        LLAMA, rope_parameters={"rope_type": "proportional", "partial_rotary_factor": 0.25}
    ),
    "p-RoPE with a factor": case(
        LLAMA,
        rope_theta=MILLION,
        rope_parameters={
            "rope_type": "proportional",
            "partial_rotary_factor": 0.75,
            "factor": 2.0,
        },
    ),
    "GPT-NeoX": case(
        model("gpt_neox", 6144, 64, 2048), 96, 2048, rotary_pct=0.25, rotary_emb_base=10_000
    ),
    "Gemma 3, full": case(
        GEMMA,
        256,
        131072,
        "full_attention",
        rope_theta=MILLION,
        rope_local_base_freq=10_000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "Gemma 3, sliding": case(
        GEMMA,
        256,
        131072,
        "sliding_attention",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": MILLION},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "SmolLM3": case(
        model("smollm3", 2048, 16, 65536, num_hidden_layers=8),
        trained=65536,
        kind="rope",
        rope_theta=5 * MILLION,
        no_rope_layers=[1, 1, 1, 0, 1, 1, 1, 0],
    ),
    "Llama 4 Scout": case(
        model("llama4_text", 5120, 40, 10_485_760, num_hidden_layers=8, head_dim=128),
        trained=8192,
        kind="rope",
        rope_theta=500_000.0,
        rope_scaling=llama3(8.0),
    ),
    "Cohere 2": case(
        model("cohere2", 4096, 32, 8192, num_hidden_layers=8, rope_theta=50_000.0),
        trained=8192,
        kind="sliding_attention",
        sliding_window=4096,
        layer_types=[*["sliding_attention"] * 3, "full_attention"] * 2,
    ),
}
MULTIPLES = (1, 4, 32)
