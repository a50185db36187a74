"""Jamba (arXiv:2403.19887): Mamba with norms inside, attention without positions, experts."""

from collections.abc import Sequence
from typing import Any

from lcm import positions
from lcm.models import ModelSpec
from lcm.pretrained.families.base import (
    HALVES,
    LINEAR,
    SAME,
    Config,
    Family,
    Weight,
    by_mixer,
    experts,
    need,
    period,
    sizes,
    sizes_to_hf,
)
from lcm.pretrained.families.mamba import inside_mamba1, plain_expand


def read(hf: Config) -> dict[str, Any]:
    need(hf, "hidden_act", "silu")
    need(hf, "mamba_conv_bias", True)
    need(hf, "mamba_proj_bias", False)
    own = sizes(hf)
    rank = hf.get("mamba_dt_rank") or "auto"
    usual = rank in ("auto", -(-own["width"] // 16))
    mamba = {
        "mixer": "mamba1",
        "heads": 1,
        "kv_heads": 0,
        "head_size": 0,
        "state": need(hf, "mamba_d_state"),
        "conv": need(hf, "mamba_d_conv"),
        "expand": float(need(hf, "mamba_expand")),
        "options": "normed=True" if usual else f"normed=True,rank={rank}",
    }
    chosen = (
        f"count={need(hf, 'num_experts')},top={need(hf, 'num_experts_per_tok')},"
        f"balance={need(hf, 'router_aux_loss_coef')}"
    )
    parts = {
        "mamba": mamba,
        "attention": {"mixer": "attention"},
        "experts": {"mlp": "experts", "mlp_options": chosen},
    }
    names = _names(hf)
    kinds = {
        name: {key: value for part in name.split("_") for key, value in parts[part].items()}
        for name in dict.fromkeys(names)
    }
    return {
        **own,
        "pattern": period(names),
        "kinds": kinds,
        "mlp": "swiglu",
        "norm": "rms",
        "norm_eps": need(hf, "rms_norm_eps"),
        "positions": positions.config(positions.NoPE()),
    }


def _names(hf: Config) -> list[str]:
    """The kinds of layers, one after the other: `mamba` or `attention`, `_experts` behind it."""
    attends, many = _turns(hf, "attn"), _turns(hf, "expert")
    many = [each and need(hf, "num_experts") > 1 for each in many]
    mixers = ("attention" if each else "mamba" for each in attends)
    return [mixer + "_experts" * each for mixer, each in zip(mixers, many, strict=True)]


def _turns(hf: Config, what: str) -> list[bool]:
    """Which layers have it: one in a period, from an offset on."""
    every, first = need(hf, f"{what}_layer_period"), need(hf, f"{what}_layer_offset")
    return [n % every == first for n in range(need(hf, "num_hidden_layers"))]


def write(spec: ModelSpec, length: int) -> Config:
    found = by_mixer(spec, ["mamba1"], ["attention"])
    mamba, attention = found["mamba1"], found.get("attention", found["mamba1"])
    layers = spec.in_order
    many = next((layer for layer in layers if layer.mlp == "experts"), None)
    return {
        **sizes_to_hf(spec, length),
        "model_type": "jamba",
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_size,
        **_turns_to_hf("attn", [layer.attends for layer in layers]),
        **_turns_to_hf("expert", [layer.mlp == "experts" for layer in layers]),
        "num_experts": many.mlp_option("count") if many else 1,
        "num_experts_per_tok": many.mlp_option("top") if many else 1,
        **({"router_aux_loss_coef": many.mlp_option("balance")} if many else {}),
        "mamba_d_state": mamba.state,
        "mamba_d_conv": mamba.conv,
        "mamba_expand": plain_expand(mamba),
        "mamba_dt_rank": mamba.option("rank") or -(-spec.width // 16),
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
    }


def _turns_to_hf(what: str, there: Sequence[bool]) -> Config:
    """The inverse of `_turns`, of layers that have it in turns."""
    at = [n for n, each in enumerate(there) if each] or [len(there)]
    every = at[1] - at[0] if len(at) > 1 else max(len(there), at[0] + 1)
    return {f"{what}_layer_period": every, f"{what}_layer_offset": at[0]}


LAYER = "model.layers.{n}"
MAMBA, ATTENTION, MLP = f"{LAYER}.mamba", f"{LAYER}.self_attn", f"{LAYER}.feed_forward"
JAMBA = Family(
    types={"jamba": "JambaForCausalLM"},
    read=read,
    write=write,
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 8,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 262_144,
    },
    weights=(
        Weight("model.embed_tokens.weight", ("embedding/table",), SAME),
        Weight("model.final_layernorm.weight", ("final_norm/scale",), SAME),
        Weight("lm_head.weight", ("head/kernel",), LINEAR),
        Weight(f"{LAYER}.input_layernorm.weight", ("mixer_norm/scale",), SAME),
        Weight(f"{LAYER}.pre_ff_layernorm.weight", ("mlp_norm/scale",), SAME),
        *(Weight(f"{ATTENTION}.{n}_proj.weight", (f"mixer/{n}",), LINEAR) for n in "qkv"),
        Weight(f"{ATTENTION}.o_proj.weight", ("mixer/out",), LINEAR, "attention"),
        *inside_mamba1(MAMBA, "mamba1"),
        *(Weight(f"{MAMBA}.{n}_layernorm.weight", (f"mixer/{n}_norm/scale",), SAME) for n in "bc"),
        Weight(f"{MAMBA}.dt_layernorm.weight", ("mixer/dt_norm/scale",), SAME),
        *(Weight(f"{MLP}.{n}_proj.weight", (f"mlp/{n}",), LINEAR) for n in HALVES),
        Weight(f"{MLP}.router.weight", ("mlp/router",), LINEAR),
        *experts(MLP),
    ),
    has=("num_experts", "num_local_experts"),
)
