"""LFM2 (arXiv:2511.23404): gated short convolutions, with a layer of attention now and then.

Its form with experts has one MLP in the first layers, and experts in the others.
"""

from typing import Any

from lcm import positions
from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.pretrained.families.base import (
    FULL,
    FUSED,
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
    rotations,
    sizes,
    sizes_to_hf,
)

CONV = "gated_conv"
MIXERS = {"conv": CONV, FULL: "attention"}
BIASES = {False: "none", True: "mixer"}  # of convolutions
LEAST = 1e-6  # beside the sum of what chosen experts score
# Keys of releases that transformers ignores.
UNSAID = {"use_pos_enc": True, "block_use_swiglu": True}


def read(hf: Config) -> dict[str, Any]:
    names, kinds = _names(hf), _kinds(hf)
    return {
        **_shared(hf),
        "hidden": _hidden(hf),
        "pattern": period(names),
        "kinds": {name: kinds[name] for name in dict.fromkeys(names)},
    }


def read_moe(hf: Config) -> dict[str, Any]:
    mixers = layer_names(hf, need(hf, "layer_types"), MIXERS)
    dense = need(hf, "num_dense_layers")
    own = {
        f"{name}_{mlp}": {**kind, **(_experts(hf) if mlp == "sparse" else {})}
        for name, kind in _kinds(hf).items()
        for mlp in ("dense", "sparse")
    }
    names = [f"{name}_{'dense' if n < dense else 'sparse'}" for n, name in enumerate(mixers)]
    return {
        **_shared(hf),
        "pattern": period(names),
        "kinds": {name: own[name] for name in dict.fromkeys(names)},
    }


def _shared(hf: Config) -> dict[str, Any]:
    for key, value in UNSAID.items():
        need(hf, key, None, value)
    plain = {key: value for key, value in hf.items() if key != "layer_types"}
    return {
        **sizes({**hf, "tie_word_embeddings": hf.get("tie_embedding", hf["tie_word_embeddings"])}),
        "positions": positions.config(rotations(plain)[FULL]),
        "mlp": "swiglu",
        "norm": "rms",
        "norm_eps": need(hf, "norm_eps"),
    }


def _names(hf: Config) -> list[str]:
    """The kinds of layers, one after the other: attention where no key says."""
    names, depth = hf.get("layer_types"), need(hf, "num_hidden_layers")
    if names is None:
        at = hf.get("full_attn_idxs")
        at = range(depth) if at is None else at
        if beyond := [n for n in at if not 0 <= n < depth]:
            raise ConfigError(
                f"full_attn_idxs has {beyond[0]} for num_hidden_layers={depth}, which are counted "
                "from 0: take the config of this checkpoint"
            )
        names = [FULL if n in at else "conv" for n in range(depth)]
    return layer_names(hf, names, MIXERS)


def _kinds(hf: Config) -> dict[str, dict[str, Any]]:
    """What mixes positions, by the names of layers."""
    conv = {
        "mixer": CONV,
        "heads": 1,  # it has none
        "kv_heads": 0,
        "head_size": 0,
        "expand": 1.0,
        "conv": need(hf, "conv_L_cache"),
        "biases": BIASES[bool(need(hf, "conv_bias"))],
    }
    return {"conv": conv, FULL: {"mixer": "attention", "qk_norm": True}}


def _hidden(hf: Config) -> int:
    """The width of MLPs: of a config that counts for two matrices, two thirds, rounded up."""
    hidden = hf.get("block_ff_dim") or need(hf, "intermediate_size")
    if not need(hf, "block_auto_adjust_ff_dim"):
        return hidden
    factor, unit = need(hf, "block_ffn_dim_multiplier"), need(hf, "block_multiple_of")
    if unit < 1:
        raise ConfigError(f"block_multiple_of={unit} must be at least 1: 1 rounds nothing")
    return -(-int(factor * int(2 * hidden / 3)) // unit) * unit


def _experts(hf: Config) -> dict[str, Any]:
    options = {
        "count": need(hf, "num_experts"),
        "top": need(hf, "num_experts_per_tok"),
        "normed": bool(need(hf, "norm_topk_prob")),
        "scores": "sigmoid",
        "corrected": bool(need(hf, "use_expert_bias")),
        "scale": float(need(hf, "routed_scaling_factor")),
        "least": LEAST,
    }
    written = ",".join(f"{name}={value}" for name, value in options.items())
    return {"mlp": "experts", "hidden": need(hf, "moe_intermediate_size"), "mlp_options": written}


def write(spec: ModelSpec, length: int) -> Config:
    return {"model_type": "lfm2", **_to_hf(spec, length), "block_auto_adjust_ff_dim": False}


def write_moe(spec: ModelSpec, length: int) -> Config:
    layers = spec.in_order
    dense = [layer for layer in layers if layer.mlp != "experts"]
    if len(dense) == len(layers):
        raise ConfigError("no layer has experts, it has them in all but the first ones")
    many = next(layer for layer in layers if layer.mlp == "experts")
    return {
        "model_type": "lfm2_moe",
        **_to_hf(spec, length),
        "intermediate_size": (dense or layers)[0].hidden,
        "num_dense_layers": len(dense),
        "moe_intermediate_size": many.hidden,
        "num_experts": many.mlp_option("count"),
        "num_experts_per_tok": many.mlp_option("top"),
        "norm_topk_prob": many.mlp_option("normed"),
        "use_expert_bias": many.mlp_option("corrected"),
        "routed_scaling_factor": many.mlp_option("scale"),
    }


def _to_hf(spec: ModelSpec, length: int) -> Config:
    found = by_mixer(spec, list(MIXERS.values()))
    conv, attention = found[CONV], found["attention"]
    return {
        **sizes_to_hf(spec, length),
        **positions.to_hf(attention.positions, spec.depth),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_size,
        "conv_L_cache": conv.conv,
        "conv_bias": key_of(BIASES, conv.biases),
        "layer_types": [key_of(MIXERS, layer.mixer) for layer in spec.in_order],
        "norm_eps": spec.norm_eps,
    }


LAYER = "model.layers.{n}"
ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.feed_forward"
THEIRS = {"gate": "w1", "up": "w3", "down": "w2"}  # of an MLP


def _conv(name: str, form: Form, *ours: str) -> tuple[Weight, ...]:
    """A matrix of the convolution and its bias."""
    return tuple(
        Weight(f"{LAYER}.conv.{name}.{what}", tuple(f"mixer/{at}{end}" for at in ours), form, CONV)
        for what, end in (("weight", ""), ("bias", "_bias"))
    )


WEIGHTS = (
    Weight("model.embed_tokens.weight", ("embedding/table",), SAME),
    Weight("model.embedding_norm.weight", ("final_norm/scale",), SAME),
    Weight("lm_head.weight", ("head/kernel",), LINEAR),
    Weight(f"{LAYER}.operator_norm.weight", ("mixer_norm/scale",), SAME),
    Weight(f"{LAYER}.ffn_norm.weight", ("mlp_norm/scale",), SAME),
    *_conv("in_proj", FUSED, "b", "c", "x"),
    *_conv("conv", LINEAR, "conv"),
    *_conv("out_proj", LINEAR, "out"),
    *(Weight(f"{ATTENTION}.{name}_proj.weight", (f"mixer/{name}",), LINEAR) for name in "qkv"),
    Weight(f"{ATTENTION}.out_proj.weight", ("mixer/out",), LINEAR, "attention"),
    *(Weight(f"{ATTENTION}.{n}_layernorm.weight", (f"mixer/{n}_norm/scale",), SAME) for n in "qk"),
    *(Weight(f"{MLP}.{name}.weight", (f"mlp/{half}",), LINEAR) for half, name in THEIRS.items()),
)
DEFAULTS = {
    "vocab_size": 65_536,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 1_000_000.0,
    "conv_bias": False,
    "conv_L_cache": 3,
}
LFM2 = Family(
    types={"lfm2": "Lfm2ForCausalLM"},
    read=read,
    write=write,
    defaults={
        **DEFAULTS,
        "hidden_size": 2560,
        "intermediate_size": 12_288,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    weights=WEIGHTS,
)
LFM2_MOE = Family(
    types={"lfm2_moe": "Lfm2MoeForCausalLM"},
    read=read_moe,
    write=write_moe,
    defaults={
        **DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
    },
    weights=(
        *WEIGHTS,
        Weight(f"{MLP}.gate.weight", ("mlp/router",), LINEAR),
        Weight(f"{MLP}.expert_bias", ("mlp/choice_bias",), SAME),
        *(
            Weight(f"{MLP}.experts.{{e}}.{name}.weight", (f"mlp/expert_{half}",), LINEAR)
            for half, name in THEIRS.items()
        ),
    ),
    has=("num_experts",),
)
