"""Bamba (IBM and others, 2024): Mamba-2 with some layers of attention, a gated MLP in all."""

from typing import Any

from lcm import positions
from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.nn import LayerSpec
from lcm.pretrained.families.base import (
    FULL,
    HALVES,
    LINEAR,
    SAME,
    Config,
    Family,
    Weight,
    by_mixer,
    need,
    period,
    rotations,
    sizes,
    sizes_to_hf,
)
from lcm.pretrained.families.mamba import check_heads, check_steps, inside_mamba2, plain_expand

MIXERS = {"mamba2", "attention"}
ROTATED = 0.5  # of a head, where rope_parameters do not say


def read(hf: Config) -> dict[str, Any]:
    need(hf, "hidden_act", "silu")
    need(hf, "attention_bias", False)
    need(hf, "mlp_bias", False)
    own, names = sizes(hf), _names(hf)
    kinds = {"mamba": mamba_kind(hf), "full": {"mixer": "attention"}}
    return {
        **own,
        "pattern": period(names),
        "kinds": {name: kinds[name] for name in dict.fromkeys(names)},
        "positions": positions.config(_positions(hf)),
        "mlp": "swiglu",
        "norm": "rms",
        "norm_eps": need(hf, "rms_norm_eps"),
    }


def mamba_kind(hf: Config) -> dict[str, Any]:
    """The keys of a layer of Mamba-2 among others, of Bamba and what is made like it."""
    need(hf, "mamba_proj_bias", False)
    need(hf, "mamba_conv_bias", True)
    check_steps(hf)
    if hf.get("mamba_d_head") not in (None, "auto"):
        check_heads(hf, "mamba_n_heads", "mamba_d_head", "mamba_expand")
    return {
        "mixer": "mamba2",
        "heads": need(hf, "mamba_n_heads"),
        "kv_heads": 0,
        "head_size": 0,
        "groups": need(hf, "mamba_n_groups"),
        "state": need(hf, "mamba_d_state"),
        "conv": need(hf, "mamba_d_conv"),
        "expand": float(need(hf, "mamba_expand")),
    }


def mamba_to_hf(layer: LayerSpec) -> Config:
    """Its inverse."""
    return {
        "mamba_n_heads": layer.heads,
        "mamba_d_head": layer.head_size,
        "mamba_n_groups": layer.groups,
        "mamba_d_state": layer.state,
        "mamba_d_conv": layer.conv,
        "mamba_expand": plain_expand(layer),
    }


def _names(hf: Config) -> list[str]:
    """The kinds of layers, one after the other: both of them."""
    depth, at = need(hf, "num_hidden_layers"), hf.get("attn_layer_indices") or []
    names = ["full" if n in at else "mamba" for n in range(depth)]
    if len(set(names)) == 1:
        raise ConfigError(
            f"attn_layer_indices={at} of num_hidden_layers={depth} makes all layers {names[0]}, "
            "Bamba has layers of attention and of Mamba-2"
        )
    return names


def _positions(hf: Config) -> positions.RoPE:
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    rope = {"partial_rotary_factor": ROTATED, "rope_theta": need(hf, "rope_theta"), **rope}
    return rotations({**hf, "rope_scaling": None, "rope_parameters": rope}, partial=True)[FULL]


def write(spec: ModelSpec, length: int) -> Config:
    found = by_mixer(spec, sorted(MIXERS))
    mamba, attention = found["mamba2"], found["attention"]
    hf = positions.to_hf(attention.positions, spec.depth)
    fraction = getattr(attention.positions, "fraction", ROTATED)
    return {
        "model_type": "bamba",
        **sizes_to_hf(spec, length),
        **hf,
        "rope_parameters": {**hf.get("rope_parameters", {}), "partial_rotary_factor": fraction},
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_size,
        "attn_layer_indices": [n for n, layer in enumerate(spec.in_order) if layer.attends],
        **mamba_to_hf(mamba),
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": spec.norm_eps,
    }


LAYER = "model.layers.{n}"
ATTENTION = f"{LAYER}.self_attn"
OURS = {"q": "q", "k": "k", "v": "v", "o": "out"}
MAMBA = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
MIXING = (
    *(
        Weight(f"{ATTENTION}.{name}_proj.weight", (f"mixer/{at}",), LINEAR, "attention")
        for name, at in OURS.items()
    ),
    *inside_mamba2(f"{LAYER}.mamba", "mamba2"),
)
BAMBA = Family(
    types={"bamba": "BambaForCausalLM"},
    read=read,
    write=write,
    defaults={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "num_key_value_heads": 8,
        **MAMBA,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 262_144,
    },
    weights=(
        Weight("model.embed_tokens.weight", ("embedding/table",), SAME),
        Weight("model.final_layernorm.weight", ("final_norm/scale",), SAME),
        Weight("lm_head.weight", ("head/kernel",), LINEAR),
        Weight(f"{LAYER}.input_layernorm.weight", ("mixer_norm/scale",), SAME),
        Weight(f"{LAYER}.pre_ff_layernorm.weight", ("mlp_norm/scale",), SAME),
        *(
            Weight(f"{LAYER}.feed_forward.{half}_proj.weight", (f"mlp/{half}",), LINEAR)
            for half in HALVES
        ),
        *MIXING,
    ),
)
