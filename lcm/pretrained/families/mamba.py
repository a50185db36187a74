"""Mamba and Mamba-2: layers of a mixer alone, without positions."""

import math
from typing import Any

from lcm import positions
from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.pretrained.families.base import (
    FUSED,
    LINEAR,
    SAME,
    Config,
    Family,
    Weight,
    need,
)


def read_mamba1(hf: Config) -> dict[str, Any]:
    width, rank = need(hf, "hidden_size"), hf.get("time_step_rank") or "auto"
    usual = rank in ("auto", -(-width // 16))
    return {
        **_shared(hf, "mamba1"),
        "heads": 1,
        "options": "" if usual else f"rank={rank}",
    }


def read_mamba2(hf: Config) -> dict[str, Any]:
    heads, size = need(hf, "num_heads"), need(hf, "head_dim")
    inner = need(hf, "hidden_size") * need(hf, "expand")
    if heads * size != inner:
        raise ConfigError(
            f"num_heads={heads} times head_dim={size} is not expand * hidden_size={inner:g}: take "
            "the config of this checkpoint"
        )
    low, high = need(hf, "time_step_limit")
    if low != 0 or not math.isinf(float(high)):
        raise ConfigError(
            f"time_step_limit=({low}, {high}) clips time steps, which the decoder does not: it has "
            "(0, inf)"
        )
    return {**_shared(hf, "mamba2"), "heads": heads, "groups": need(hf, "n_groups")}


def _shared(hf: Config, mixer: str) -> dict[str, Any]:
    need(hf, "hidden_act", "silu")
    need(hf, "use_bias", False)
    need(hf, "use_conv_bias", True)
    return {
        "mixer": mixer,
        "pattern": (mixer,),
        "mlp": "none",
        "width": need(hf, "hidden_size"),
        "depth": need(hf, "num_hidden_layers"),
        "vocab": need(hf, "vocab_size"),
        "tied": bool(need(hf, "tie_word_embeddings")),
        "state": need(hf, "state_size"),
        "conv": need(hf, "conv_kernel"),
        "expand": need(hf, "expand"),
        "norm": "rms",
        "norm_eps": need(hf, "layer_norm_epsilon"),
        "positions": positions.config(positions.NoPE()),
    }


def write_mamba1(spec: ModelSpec, length: int) -> Config:
    layer = spec.layers[0]
    _check_mixer(spec, "mamba1", "Mamba")
    rank = layer.option("rank") or -(-spec.width // 16)
    return {"model_type": "mamba", **_shared_to_hf(spec, length), "time_step_rank": rank}


def write_mamba2(spec: ModelSpec, length: int) -> Config:
    layer = spec.layers[0]
    _check_mixer(spec, "mamba2", "Mamba-2")
    return {
        "model_type": "mamba2",
        **_shared_to_hf(spec, length),
        "num_heads": layer.heads,
        "head_dim": layer.head_size,
        "n_groups": layer.groups,
    }


def _shared_to_hf(spec: ModelSpec, length: int) -> Config:
    layer = spec.layers[0]
    expand = layer.expand
    return {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "vocab_size": spec.vocab,
        "tie_word_embeddings": spec.tied,
        "state_size": layer.state,
        "conv_kernel": layer.conv,
        "expand": int(expand) if expand == int(expand) else expand,
        "layer_norm_epsilon": spec.norm_eps,
        "seq_length": length,
    }


def _check_mixer(spec: ModelSpec, mixer: str, name: str) -> None:
    others = [layer.mixer for layer in spec.layers if layer.mixer != mixer]
    if others:
        raise ConfigError(f"layers are {others[0]}, those of {name} are all {mixer}")


DEFAULTS = {
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "state_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    "layer_norm_epsilon": 1e-5,
    "seq_length": 2048,  # of the releases; no config says
}
LAYER = "backbone.layers.{n}"
ENDS = (
    Weight("backbone.embeddings.weight", ("embedding/table",), SAME),
    Weight("backbone.norm_f.weight", ("final_norm/scale",), SAME),
    Weight("lm_head.weight", ("head/kernel",), LINEAR),
    Weight(f"{LAYER}.norm.weight", ("mixer_norm/scale",), SAME),
    Weight(f"{LAYER}.mixer.out_proj.weight", ("mixer/out",), LINEAR),
    Weight(f"{LAYER}.mixer.A_log", ("mixer/A_log",), SAME),
    Weight(f"{LAYER}.mixer.D", ("mixer/D",), SAME),
)
# The first releases call the table so.
RENAMED = ((r"^backbone\.embedding\.", "backbone.embeddings."),)
MAMBA = Family(
    types={"mamba": "MambaForCausalLM"},
    read=read_mamba1,
    write=write_mamba1,
    defaults={**DEFAULTS, "tie_word_embeddings": True},
    weights=(
        *ENDS,
        Weight(f"{LAYER}.mixer.in_proj.weight", ("mixer/x", "mixer/z"), FUSED),
        # Its transpose is [W, 1, E].
        Weight(f"{LAYER}.mixer.conv1d.weight", ("mixer/conv",), LINEAR),
        Weight(f"{LAYER}.mixer.conv1d.bias", ("mixer/conv_bias",), SAME),
        Weight(f"{LAYER}.mixer.x_proj.weight", ("mixer/dt_down", "mixer/bc"), FUSED),
        Weight(f"{LAYER}.mixer.dt_proj.weight", ("mixer/dt_up",), LINEAR),
        Weight(f"{LAYER}.mixer.dt_proj.bias", ("mixer/dt_bias",), SAME),
    ),
    renamed=RENAMED,
)
PARTS = ("mixer/z", "mixer/x", "mixer/bc", "mixer/dt")
MAMBA2 = Family(
    types={"mamba2": "Mamba2ForCausalLM"},
    read=read_mamba2,
    write=write_mamba2,
    defaults={
        **DEFAULTS,
        "state_size": 128,
        "num_heads": 128,
        "head_dim": 64,
        "n_groups": 8,
        "time_step_limit": [0.0, math.inf],
        "tie_word_embeddings": False,
    },
    weights=(
        *ENDS,
        Weight(f"{LAYER}.mixer.in_proj.weight", PARTS, FUSED),
        Weight(f"{LAYER}.mixer.conv1d.weight", ("mixer/conv_x", "mixer/conv_bc"), FUSED),
        Weight(f"{LAYER}.mixer.conv1d.bias", ("mixer/conv_x_bias", "mixer/conv_bc_bias"), FUSED),
        Weight(f"{LAYER}.mixer.dt_bias", ("mixer/dt_bias",), SAME),
        Weight(f"{LAYER}.mixer.norm.weight", ("mixer/norm/scale",), SAME),
    ),
    renamed=RENAMED,
)
