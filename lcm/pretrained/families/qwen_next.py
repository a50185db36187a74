"""Qwen3-Next and Qwen 3.5: Gated DeltaNet with a layer of gated attention in four.

Qwen3-Next has experts in all layers, or in none; Qwen 3.5 is its form without.
"""

from typing import Any

from lcm import positions
from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.pretrained.families import llama
from lcm.pretrained.families.base import (
    BY_HEAD,
    BY_KEY_HEAD,
    FULL,
    FUSED,
    HALVES,
    LINEAR,
    ONE_LESS,
    SAME,
    Config,
    Family,
    Weight,
    by_mixer,
    experts,
    key_of,
    layer_names,
    need,
    period,
    rotations,
    sizes,
    sizes_to_hf,
)

MIXERS = {"linear_attention": "gated_deltanet", FULL: "attention"}
# Of images, whose tokens have a place in width and height: of text all three are the same.
IMAGES = "mrope_section", "mrope_interleaved"


def read_next(hf: Config) -> dict[str, Any]:
    count = need(hf, "num_experts")
    if not count:
        return read(hf)
    need(hf, "decoder_sparse_step", 1)
    if hf["mlp_only_layers"]:
        raise ConfigError(
            f"mlp_only_layers={hf['mlp_only_layers']} has layers without experts, which releases "
            "have not: take a checkpoint with experts in all layers or in none"
        )
    options = {
        "count": count,
        "top": need(hf, "num_experts_per_tok"),
        "normed": bool(need(hf, "norm_topk_prob")),
        "shared": need(hf, "shared_expert_intermediate_size"),
        "balance": need(hf, "router_aux_loss_coef"),
    }
    return {
        **read(hf),
        "mlp": "experts",
        "hidden": need(hf, "moe_intermediate_size"),
        "mlp_options": ",".join(f"{name}={value}" for name, value in options.items()),
    }


def read(hf: Config) -> dict[str, Any]:
    need(hf, "hidden_act", "silu")
    need(hf, "attention_bias", False)
    own, names = sizes(hf), _names(hf)
    key_heads, heads = need(hf, "linear_num_key_heads"), need(hf, "linear_num_value_heads")
    inner = heads * need(hf, "linear_value_head_dim")
    linear = {
        "mixer": "gated_deltanet",
        "heads": heads,
        "kv_heads": key_heads,
        "head_size": hf["linear_value_head_dim"],
        "state": need(hf, "linear_key_head_dim"),
        "expand": inner / own["width"],
        "conv": need(hf, "linear_conv_kernel_dim"),
    }
    attention = {"mixer": "attention", "qk_norm": True, "options": "gated=True"}
    kinds = {"linear_attention": linear, FULL: attention}
    return {
        **own,
        "pattern": period(names),
        "kinds": {name: kinds[name] for name in dict.fromkeys(names)},
        "positions": positions.config(rotations(_rotated(hf), partial=True)[FULL]),
        "mlp": "swiglu",
        "norm": "rms",
        "norm_eps": need(hf, "rms_norm_eps"),
    }


def _names(hf: Config) -> list[str]:
    """The kinds of layers, one after the other."""
    depth, every = need(hf, "num_hidden_layers"), hf.get("full_attention_interval") or 4
    names = hf.get("layer_types")
    if names is None:
        names = [FULL if (n + 1) % every == 0 else "linear_attention" for n in range(depth)]
    return layer_names(hf, names, MIXERS)


def _rotated(hf: Config) -> Config:
    """The keys of rotations, as of a model whose layers are all attention and which reads text."""
    plain = {key: value for key, value in hf.items() if key != "layer_types"}
    rope = plain.get("rope_parameters")
    if rope:
        plain["rope_parameters"] = {k: v for k, v in rope.items() if k not in IMAGES}
    return plain


def write_next(spec: ModelSpec, length: int) -> Config:
    hf, layer = {"model_type": "qwen3_next", **_to_hf(spec, length)}, spec.layers[0]
    if layer.mlp != "experts":
        return {**hf, "num_experts": 0}
    return {
        **hf,
        "num_experts": layer.mlp_option("count"),
        "num_experts_per_tok": layer.mlp_option("top"),
        "norm_topk_prob": layer.mlp_option("normed"),
        "shared_expert_intermediate_size": layer.mlp_option("shared"),
        "router_aux_loss_coef": layer.mlp_option("balance"),
        "moe_intermediate_size": layer.hidden,
    }


def write_qwen3_5(spec: ModelSpec, length: int) -> Config:
    return {"model_type": "qwen3_5_text", **_to_hf(spec, length)}


def _to_hf(spec: ModelSpec, length: int) -> Config:
    found = by_mixer(spec, list(MIXERS.values()))
    linear, attention = found["gated_deltanet"], found["attention"]
    mixers = [layer.mixer for layer in spec.in_order]
    return {
        **sizes_to_hf(spec, length),
        **positions.to_hf(attention.positions, spec.depth),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_size,
        "linear_num_key_heads": linear.kv_heads,
        "linear_num_value_heads": linear.heads,
        "linear_key_head_dim": linear.state,
        "linear_value_head_dim": linear.head_size,
        "linear_conv_kernel_dim": linear.conv,
        "layer_types": [key_of(MIXERS, mixer) for mixer in mixers],
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": spec.norm_eps,
    }


LAYER = "model.layers.{n}"
LINEAR_ATTENTION, ATTENTION = f"{LAYER}.linear_attn", f"{LAYER}.self_attn"
CONVOLVED = ("mixer/conv_q", "mixer/conv_k", "mixer/conv_v")
SHARED = (
    Weight("model.embed_tokens.weight", ("embedding/table",), SAME),
    Weight("model.norm.weight", ("final_norm/scale",), ONE_LESS),
    Weight("lm_head.weight", ("head/kernel",), LINEAR),
    Weight(f"{LAYER}.input_layernorm.weight", ("mixer_norm/scale",), ONE_LESS),
    Weight(f"{LAYER}.post_attention_layernorm.weight", ("mlp_norm/scale",), ONE_LESS),
    Weight(f"{LAYER}.mlp.gate_proj.weight", ("mlp/gate",), LINEAR),
    Weight(f"{LAYER}.mlp.up_proj.weight", ("mlp/up",), LINEAR),
    Weight(f"{LAYER}.mlp.down_proj.weight", ("mlp/down",), LINEAR),
    Weight(f"{ATTENTION}.q_proj.weight", ("mixer/q", "mixer/gate"), BY_HEAD, "attention"),
    Weight(f"{ATTENTION}.k_proj.weight", ("mixer/k",), LINEAR, "attention"),
    Weight(f"{ATTENTION}.v_proj.weight", ("mixer/v",), LINEAR, "attention"),
    Weight(f"{ATTENTION}.o_proj.weight", ("mixer/out",), LINEAR, "attention"),
    Weight(f"{ATTENTION}.q_norm.weight", ("mixer/q_norm/scale",), ONE_LESS),
    Weight(f"{ATTENTION}.k_norm.weight", ("mixer/k_norm/scale",), ONE_LESS),
    Weight(f"{LINEAR_ATTENTION}.conv1d.weight", CONVOLVED, FUSED),
    Weight(f"{LINEAR_ATTENTION}.A_log", ("mixer/A_log",), SAME),
    Weight(f"{LINEAR_ATTENTION}.dt_bias", ("mixer/dt_bias",), SAME),
    Weight(f"{LINEAR_ATTENTION}.norm.weight", ("mixer/norm/scale",), SAME),
    Weight(f"{LINEAR_ATTENTION}.out_proj.weight", ("mixer/out",), LINEAR, "gated_deltanet"),
)


def _linear(name: str, form: Any, *paths: str) -> Weight:
    paths = tuple(f"mixer/{path}" for path in paths)
    return Weight(f"{LINEAR_ATTENTION}.{name}.weight", paths, form, "gated_deltanet")


DEFAULTS = {
    **llama.LLAMA.defaults,
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "attention_bias": False,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "tie_word_embeddings": False,
}
MLP = f"{LAYER}.mlp"
EXPERTS = (
    Weight(f"{MLP}.gate.weight", ("mlp/router",), LINEAR),
    Weight(f"{MLP}.shared_expert_gate.weight", ("mlp/shared_gate",), LINEAR),
    *(
        Weight(f"{MLP}.shared_expert.{name}_proj.weight", (f"mlp/shared/{name}",), LINEAR)
        for name in HALVES
    ),
    *experts(MLP),
)
QWEN3_NEXT = Family(
    types={"qwen3_next": "Qwen3NextForCausalLM"},
    read=read_next,
    write=write_next,
    defaults={
        **DEFAULTS,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "router_aux_loss_coef": 0.001,
        "norm_topk_prob": True,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    weights=(
        *SHARED,
        *EXPERTS,
        _linear("in_proj_qkvz", BY_KEY_HEAD, "q", "k", "v", "z"),
        _linear("in_proj_ba", BY_KEY_HEAD, "beta", "a"),
    ),
    harmless=(llama.ROTATIONS, r"^mtp\."),
    has=("num_experts",),
)
QWEN3_5 = Family(
    types={"qwen3_5_text": "Qwen3_5ForCausalLM", "qwen3_5": "Qwen3_5ForConditionalGeneration"},
    read=read,
    write=write_qwen3_5,
    defaults=DEFAULTS,
    weights=(
        *SHARED,
        _linear("in_proj_qkv", FUSED, "q", "k", "v"),
        _linear("in_proj_z", LINEAR, "z"),
        _linear("in_proj_b", LINEAR, "beta"),
        _linear("in_proj_a", LINEAR, "a"),
    ),
    renamed=((r"^model\.language_model\.", "model."),),
    harmless=(llama.ROTATIONS, r"^mtp\.", r"^model\.visual\."),
)
