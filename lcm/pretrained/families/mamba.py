"""Mamba and Mamba-2: layers of a mixer alone, without positions."""

import math
from typing import Any

from lcm import positions
from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.nn import LayerSpec
from lcm.pretrained.families.base import (
    FUSED,
    LINEAR,
    SAME,
    Config,
    Family,
    Weight,
    check_mixer,
    need,
)


def read_mamba1(hf: Config, *options: str) -> dict[str, Any]:
    """With options of the mixer besides what the config says, as `NAME=VALUE`."""
    width, rank = need(hf, "hidden_size"), hf.get("time_step_rank") or "auto"
    usual = rank in ("auto", -(-width // 16))
    return {
        **_shared(hf, "mamba1"),
        "heads": 1,
        "options": ",".join([*options, *([] if usual else [f"rank={rank}"])]),
    }


def read_mamba2(hf: Config) -> dict[str, Any]:
    check_heads(hf, "num_heads", "head_dim", "expand")
    check_steps(hf)
    return {**_shared(hf, "mamba2"), "heads": hf["num_heads"], "groups": need(hf, "n_groups")}


def check_heads(hf: Config, count: str, size: str, expand: str) -> None:
    """Refuses heads, by these keys, that are not all channels of a Mamba-2."""
    inner = need(hf, "hidden_size") * need(hf, expand)
    if need(hf, count) * need(hf, size) != inner:
        raise ConfigError(
            f"{count}={hf[count]} times {size}={hf[size]} is not {expand} * hidden_size={inner:g}: "
            "take the config of this checkpoint"
        )


def check_steps(hf: Config) -> None:
    """Refuses limits of time steps. An infinite one is a float, or what transformers writes."""
    low, high = hf.get("time_step_limit") or (0, math.inf)
    high = float(high["__float__"] if isinstance(high, dict) else high)
    if low != 0 or not math.isinf(high):
        raise ConfigError(
            f"time_step_limit=({low}, {high}) clips time steps, which the decoder does not: it has "
            "(0, inf)"
        )


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
    check_mixer(spec, "mamba1", "Mamba")
    rank = layer.option("rank") or -(-spec.width // 16)
    return {"model_type": "mamba", **_shared_to_hf(spec, length), "time_step_rank": rank}


def write_mamba2(spec: ModelSpec, length: int) -> Config:
    layer = spec.layers[0]
    check_mixer(spec, "mamba2", "Mamba-2")
    return {
        "model_type": "mamba2",
        **_shared_to_hf(spec, length),
        "num_heads": layer.heads,
        "head_dim": layer.head_size,
        "n_groups": layer.groups,
    }


def _shared_to_hf(spec: ModelSpec, length: int) -> Config:
    layer = spec.layers[0]
    return {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "vocab_size": spec.vocab,
        "tie_word_embeddings": spec.tied,
        "state_size": layer.state,
        "conv_kernel": layer.conv,
        "expand": plain_expand(layer),
        "layer_norm_epsilon": spec.norm_eps,
        "seq_length": length,
    }


def plain_expand(layer: LayerSpec) -> float:
    """A whole number as one, as configs have it."""
    return int(layer.expand) if layer.expand == int(layer.expand) else layer.expand


def inside_mamba1(stem: str, mixer: str = "") -> tuple[Weight, ...]:
    """The tensors of a Mamba below a stem, but for norms; `mixer` as a `Weight` has it."""
    return (
        Weight(f"{stem}.in_proj.weight", ("mixer/x", "mixer/z"), FUSED),
        # Its transpose is [W, 1, E].
        Weight(f"{stem}.conv1d.weight", ("mixer/conv",), LINEAR),
        Weight(f"{stem}.conv1d.bias", ("mixer/conv_bias",), SAME),
        Weight(f"{stem}.x_proj.weight", ("mixer/dt_down", "mixer/bc"), FUSED),
        Weight(f"{stem}.dt_proj.weight", ("mixer/dt_up",), LINEAR),
        Weight(f"{stem}.dt_proj.bias", ("mixer/dt_bias",), SAME),
        *_both(stem, mixer),
    )


def inside_mamba2(stem: str, mixer: str = "") -> tuple[Weight, ...]:
    """The tensors of a Mamba-2 below a stem; `mixer` as a `Weight` has it."""
    parts = "mixer/z", "mixer/x", "mixer/bc", "mixer/dt"
    return (
        Weight(f"{stem}.in_proj.weight", parts, FUSED),
        Weight(f"{stem}.conv1d.weight", ("mixer/conv_x", "mixer/conv_bc"), FUSED),
        Weight(f"{stem}.conv1d.bias", ("mixer/conv_x_bias", "mixer/conv_bc_bias"), FUSED),
        Weight(f"{stem}.dt_bias", ("mixer/dt_bias",), SAME),
        Weight(f"{stem}.norm.weight", ("mixer/norm/scale",), SAME),
        *_both(stem, mixer),
    )


def _both(stem: str, mixer: str = "") -> tuple[Weight, ...]:
    return (
        Weight(f"{stem}.A_log", ("mixer/A_log",), SAME),
        Weight(f"{stem}.D", ("mixer/D",), SAME),
        Weight(f"{stem}.out_proj.weight", ("mixer/out",), LINEAR, mixer),
    )


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
)
# The first releases call the table so.
RENAMED = ((r"^backbone\.embedding\.", "backbone.embeddings."),)
MAMBA = Family(
    types={"mamba": "MambaForCausalLM"},
    read=read_mamba1,
    write=write_mamba1,
    defaults={**DEFAULTS, "tie_word_embeddings": True},
    weights=(*ENDS, *inside_mamba1(f"{LAYER}.mixer")),
    renamed=RENAMED,
)
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
    weights=(*ENDS, *inside_mamba2(f"{LAYER}.mixer")),
    renamed=RENAMED,
)
