"""Kimi Linear (arXiv:2510.26692): Kimi delta attention, with a layer of latent attention in four.

No layer has positions. The first ones have one MLP, the others experts and one that all share.
"""

from typing import Any

from lcm import positions
from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.pretrained.families.base import (
    BY_HEAD,
    FULL,
    FUSED,
    HALVES,
    LINEAR,
    SAME,
    Config,
    Family,
    Form,
    Weight,
    by_mixer,
    key_of,
    layer_names,
    need,
    period,
)

KDA, LATENT = "kda", "latent_attention"
MIXERS = {"linear_attention": KDA, FULL: LATENT}
MLPS = {"dense": "swiglu", "sparse": "experts"}
EPS = 1e-6  # of the norms of latents, whatever the config says of the others
# Other names that the class of transformers has for keys of the release, which it reads and writes.
ALIASES = {
    "num_experts": "num_local_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
}

# What the decoder has in one form alone; keys of the release that the others ignore.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_expert_group": 1,
}
UNSAID = {"mla_use_nope": True, "moe_router_activation_func": "sigmoid", "moe_layer_freq": 1}


def read(hf: Config) -> dict[str, Any]:
    hf = {**hf, **{key: hf[alias] for key, alias in ALIASES.items() if alias in hf}}
    for key, value in FIXED.items():
        need(hf, key, value)
    for key, value in UNSAID.items():
        need(hf, key, None, value)
    heads = need(hf, "num_attention_heads")
    need(hf, "num_key_value_heads", None, heads)
    names, width = _names(hf), need(hf, "hidden_size")
    parts = {
        "linear_attention": _delta(hf, width),
        FULL: _latent(hf),
        "dense": {"mlp": "swiglu"},
        "sparse": _experts(hf) if any(mlp == "sparse" for _, mlp in names) else {},
    }
    kinds = {"_".join(name): {**parts[name[0]], **parts[name[1]]} for name in names}
    return {
        "width": width,
        "depth": len(names),
        "hidden": need(hf, "intermediate_size"),
        "heads": heads,
        "head_size": need(hf, "qk_nope_head_dim"),
        "vocab": need(hf, "vocab_size"),
        "tied": False,
        "pattern": period(["_".join(name) for name in names]),
        "kinds": kinds,
        "positions": positions.config(positions.NoPE()),
        "norm": "rms",
        "norm_eps": need(hf, "rms_norm_eps"),
    }


def _names(hf: Config) -> list[tuple[str, str]]:
    """What mixes positions in each layer, and its MLP, one layer after the other."""
    depth, linear = need(hf, "num_hidden_layers"), hf.get("linear_attn_config") or {}
    mixers, mlps = hf.get("layer_types"), hf.get("mlp_layer_types")
    if mixers is None and "full_attn_layers" in linear:  # counted from 1
        full = set(linear["full_attn_layers"])
        mixers = [FULL if n + 1 in full else "linear_attention" for n in range(depth)]
    if mixers is None:
        mixers = [FULL if n and n % 4 == 0 else "linear_attention" for n in range(depth)]
    if mlps is None:
        dense = hf.get("first_k_dense_replace", 1)
        mlps = ["dense" if n < dense else "sparse" for n in range(depth)]
    mixers = layer_names(hf, mixers, MIXERS)
    return list(zip(mixers, layer_names(hf, mlps, MLPS, "mlp_layer_types"), strict=True))


def _delta(hf: Config, width: int) -> Config:
    own = hf.get("linear_attn_config") or {}
    heads = own.get("num_heads") or need(hf, "linear_num_heads")
    size = own.get("head_dim") or need(hf, "linear_head_dim")
    return {
        "mixer": KDA,
        "heads": heads,
        "head_size": size,
        "state": size,
        "expand": heads * size / width,
        "conv": own.get("short_conv_kernel_size") or need(hf, "linear_conv_kernel_dim"),
        "options": f"rank={size}",
    }


def _latent(hf: Config) -> Config:
    options = {
        "rank": need(hf, "kv_lora_rank"),
        "shared": need(hf, "qk_rope_head_dim"),
        "values": need(hf, "v_head_dim"),
        "query_rank": hf.get("q_lora_rank") or 0,
        "eps": EPS,
    }
    return {"mixer": LATENT, "options": _written(options)}


def _experts(hf: Config) -> Config:
    hidden, shared = need(hf, "moe_intermediate_size"), need(hf, "num_shared_experts")
    if shared < 1:
        raise ConfigError(
            f"num_shared_experts={shared} leaves tokens without the expert that all go through, "
            "which releases have: take a checkpoint with 1 or more"
        )
    options = {
        "count": need(hf, "num_experts"),
        "top": need(hf, "num_experts_per_token"),
        "normed": bool(need(hf, "moe_renormalize")),
        "shared": shared * hidden,
        "scores": "sigmoid",
        "corrected": True,
        "scale": float(need(hf, "routed_scaling_factor")),
        "shared_gate": False,
    }
    return {"mlp": "experts", "hidden": hidden, "mlp_options": _written(options)}


def _written(options: Config) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())


def write(spec: ModelSpec, length: int) -> Config:
    found = by_mixer(spec, [KDA, LATENT])
    delta, latent = found[KDA], found[LATENT]
    layers = spec.in_order
    many = next((layer for layer in layers if layer.mlp == "experts"), None)
    dense = next((layer for layer in layers if layer.mlp != "experts"), layers[0])
    return {
        "model_type": "kimi_linear",
        **FIXED,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "intermediate_size": dense.hidden,
        "vocab_size": spec.vocab,
        "model_max_length": length,
        "num_attention_heads": latent.heads,
        "num_key_value_heads": latent.kv_heads,
        "qk_nope_head_dim": latent.head_size,
        "qk_rope_head_dim": latent.dims.head_size,
        "v_head_dim": latent.option("values") or latent.head_size,
        "kv_lora_rank": latent.option("rank") or 4 * latent.head_size,
        "q_lora_rank": latent.option("query_rank") or None,
        "linear_num_heads": delta.heads,
        "linear_head_dim": delta.head_size,
        "linear_conv_kernel_dim": delta.conv,
        "layer_types": [key_of(MIXERS, layer.mixer) for layer in layers],
        "mlp_layer_types": [key_of(MLPS, layer.mlp) for layer in layers],
        **(_experts_to_hf(many) if many else {}),
        "rms_norm_eps": spec.norm_eps,
    }


def _experts_to_hf(layer: Any) -> Config:
    option = layer.mlp_option
    return {
        "moe_intermediate_size": layer.hidden,
        "num_experts": option("count"),
        "num_experts_per_token": option("top"),
        "moe_renormalize": option("normed"),
        "num_shared_experts": option("shared") // layer.hidden,
        "routed_scaling_factor": option("scale"),
    }


LAYER = "model.layers.{n}"
ATTENTION, MLP, EXPERTS = f"{LAYER}.self_attn", f"{LAYER}.mlp", f"{LAYER}.block_sparse_moe"
THEIRS = {"gate": "w1", "up": "w3", "down": "w2"}  # of an expert
RATES = Form(  # [1, 1, H, 1]
    lambda tensor, *_: [tensor.reshape(-1)], lambda ours, *_: ours[0].reshape(1, 1, -1, 1)
)


def _projections(mixer: str, **names: str) -> tuple[Weight, ...]:
    """Matrices of a mixer, by their names here."""
    return tuple(
        Weight(f"{ATTENTION}.{theirs}_proj.weight", (f"mixer/{ours}",), LINEAR, mixer)
        for ours, theirs in names.items()
    )


KIMI_LINEAR = Family(
    types={"kimi_linear": "KimiLinearForCausalLM"},
    read=read,
    write=write,
    defaults={
        "vocab_size": 163_840,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "moe_intermediate_size": 1024,
        "num_hidden_layers": 27,
        "num_attention_heads": 32,
        "num_shared_experts": 1,
        "routed_scaling_factor": 2.446,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "num_expert_group": 1,
        "num_experts_per_token": 8,
        "moe_renormalize": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "num_experts": 256,
        "linear_head_dim": 128,
        "linear_num_heads": 32,
        "linear_conv_kernel_dim": 4,
    },
    weights=(
        Weight("model.embed_tokens.weight", ("embedding/table",), SAME),
        Weight("model.norm.weight", ("final_norm/scale",), SAME),
        Weight("lm_head.weight", ("head/kernel",), LINEAR),
        Weight(f"{LAYER}.input_layernorm.weight", ("mixer_norm/scale",), SAME),
        Weight(f"{LAYER}.post_attention_layernorm.weight", ("mlp_norm/scale",), SAME),
        *_projections(KDA, q="q", k="k", v="v", out="o", beta="b"),
        *_projections(KDA, decay_down="f_a", decay_up="f_b", gate_down="g_a", gate_up="g_b"),
        *(
            Weight(f"{ATTENTION}.{name}_conv1d.weight", (f"mixer/conv_{name}",), LINEAR)
            for name in "qkv"
        ),
        Weight(f"{ATTENTION}.A_log", ("mixer/A_log",), RATES),
        Weight(f"{ATTENTION}.dt_bias", ("mixer/dt_bias",), SAME),
        Weight(f"{ATTENTION}.o_norm.weight", ("mixer/norm/scale",), SAME),
        *_projections(LATENT, q="q", q_down="q_a", q_up="q_b", out="o"),
        Weight(f"{ATTENTION}.q_a_layernorm.weight", ("mixer/q_norm/scale",), SAME),
        Weight(f"{ATTENTION}.kv_a_proj_with_mqa.weight", ("mixer/latent", "mixer/shared"), FUSED),
        Weight(f"{ATTENTION}.kv_a_layernorm.weight", ("mixer/latent_norm/scale",), SAME),
        Weight(f"{ATTENTION}.kv_b_proj.weight", ("mixer/k_up", "mixer/v_up"), BY_HEAD),
        *(Weight(f"{MLP}.{half}_proj.weight", (f"mlp/{half}",), LINEAR) for half in HALVES),
        Weight(f"{EXPERTS}.gate.weight", ("mlp/router",), LINEAR),
        Weight(f"{EXPERTS}.gate.e_score_correction_bias", ("mlp/choice_bias",), SAME),
        *(
            Weight(f"{EXPERTS}.experts.{{e}}.{name}.weight", (f"mlp/expert_{half}",), LINEAR)
            for half, name in THEIRS.items()
        ),
        *(
            Weight(f"{EXPERTS}.shared_experts.{half}_proj.weight", (f"mlp/shared/{half}",), LINEAR)
            for half in HALVES
        ),
    ),
    # As transformers (5.24) writes the MLPs of layers without experts.
    renamed=((r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),),
    has=("num_experts", "num_local_experts", "kv_lora_rank"),
)
