"""Granite 4.0 without experts: Mamba-2, attention, or both, with factors at every seam.

Its config's type is that of the models with experts, of which these have the shared one alone.
"""

from typing import Any

from lcm import positions
from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.pretrained.families.bamba import LAYER, MAMBA, MIXERS, MIXING, mamba_kind, mamba_to_hf
from lcm.pretrained.families.base import (
    FULL,
    FUSED,
    LINEAR,
    SAME,
    Config,
    Family,
    Weight,
    by_mixer,
    layer_names,
    need,
    period,
    rotations,
    sizes,
    sizes_to_hf,
)

# Of layers, by the names that releases and transformers 5 have for them.
KINDS = {"mamba": "mamba", "linear_attention": "mamba", "attention": "full", FULL: "full"}
FACTORS = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")


def read(hf: Config) -> dict[str, Any]:
    need(hf, "hidden_act", "silu")
    need(hf, "attention_bias", False)
    if need(hf, "num_local_experts"):
        raise ConfigError(
            f"num_local_experts={hf['num_local_experts']}: Granite is read without experts, take "
            "a checkpoint with 0, such as those called micro, 1b and 350m"
        )
    for key in FACTORS:
        if need(hf, key) <= 0:
            raise ConfigError(f"{key}={hf[key]} must be more than 0: 1 changes nothing")
    own, names = sizes(hf), _names(hf)
    kinds = {name: {"mixer": "attention"} if name == "full" else mamba_kind(hf) for name in names}
    usual = own["head_size"] ** -0.5
    scale = float(hf["attention_multiplier"])
    return {
        **own,
        "hidden": need(hf, "shared_intermediate_size"),
        "pattern": period(names),
        "kinds": kinds,
        "positions": positions.config(_positions(hf)),
        "embed_scale": float(hf["embedding_multiplier"]),
        "residual_scale": float(hf["residual_multiplier"]),
        "logit_divisor": float(hf["logits_scaling"]),
        "score_scale": 0.0 if scale == usual else scale,
        "mlp": "swiglu",
        "norm": "rms",
        "norm_eps": need(hf, "rms_norm_eps"),
    }


def _names(hf: Config) -> list[str]:
    """The kinds of layers, one after the other."""
    depth = need(hf, "num_hidden_layers")
    names = hf.get("layer_types") or hf.get("layers_block_type") or ["mamba"] * depth
    return [KINDS[name] for name in layer_names(hf, names, KINDS)]


def _positions(hf: Config) -> positions.PositionEncoding:
    """Nothing where no kind is said."""
    if need(hf, "position_embedding_type", None, "nope", "rope") != "rope":
        return positions.NoPE()
    return rotations({key: value for key, value in hf.items() if key != "layer_types"})[FULL]


def write(spec: ModelSpec, length: int) -> Config:
    found = by_mixer(spec, (), sorted(MIXERS))
    mamba, attention = found.get("mamba2"), found.get("attention")
    # Sizes of what is not there are free, but must go together.
    channels = {"mamba_n_heads": 1, "mamba_d_head": 2 * spec.width, "mamba_expand": 2}
    layer = spec.layers[0]
    return {
        "model_type": "granitemoehybrid",
        **sizes_to_hf(spec, length),
        "num_attention_heads": attention.heads if attention else 1,
        "num_key_value_heads": attention.kv_heads if attention else 1,
        "head_dim": attention.head_size if attention else spec.width,
        "shared_intermediate_size": layer.hidden,
        "num_local_experts": 0,
        **(mamba_to_hf(mamba) if mamba else channels),
        "layer_types": [FULL if each.attends else "linear_attention" for each in spec.in_order],
        **_positions_to_hf(attention.positions if attention else positions.NoPE(), spec.depth),
        "embedding_multiplier": spec.embed_scale,
        "residual_multiplier": layer.residual_scale,
        "logits_scaling": spec.logit_divisor,
        "attention_multiplier": _score_scale(spec),
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": spec.norm_eps,
    }


def _positions_to_hf(encoding: positions.PositionEncoding, depth: int) -> Config:
    if isinstance(encoding, positions.NoPE):
        return {"position_embedding_type": "nope"}
    return {"position_embedding_type": "rope", **positions.to_hf(encoding, depth)}


def _score_scale(spec: ModelSpec) -> float:
    """That of attention, whose usual one depends on its heads; of a model without it any."""
    attention = next((layer for layer in spec.layers if layer.attends), None)
    if attention is None:
        return spec.layers[0].score_scale or spec.width**-0.5
    return attention.score_scale or attention.head_size**-0.5


GRANITE = Family(
    types={"granitemoehybrid": "GraniteMoeHybridForCausalLM"},
    read=read,
    write=write,
    defaults={
        **MAMBA,
        "hidden_act": "silu",
        "attention_bias": False,
        "num_local_experts": 8,
        "shared_intermediate_size": 1024,
        **dict.fromkeys(FACTORS, 1.0),
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    },
    weights=(
        Weight("model.embed_tokens.weight", ("embedding/table",), SAME),
        Weight("model.norm.weight", ("final_norm/scale",), SAME),
        Weight("lm_head.weight", ("head/kernel",), LINEAR),
        Weight(f"{LAYER}.input_layernorm.weight", ("mixer_norm/scale",), SAME),
        Weight(f"{LAYER}.post_attention_layernorm.weight", ("mlp_norm/scale",), SAME),
        Weight(f"{LAYER}.shared_mlp.input_linear.weight", ("mlp/gate", "mlp/up"), FUSED),
        Weight(f"{LAYER}.shared_mlp.output_linear.weight", ("mlp/down",), LINEAR),
        *MIXING,
    ),
    has=("num_local_experts",),
)
