"""xLSTM-7B (arXiv:2503.13427): mLSTM with a gated MLP in every layer, gates and logits capped."""

from typing import Any

from lcm import positions
from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.nn.mlstm import EPS, MLSTM
from lcm.pretrained.families.base import (
    LINEAR,
    SAME,
    Config,
    Family,
    Weight,
    check_mixer,
    need,
)
from lcm.pretrained.families.rwkv import HEADS

MIXER = "mlstm"
CAP = MLSTM.OPTIONS["cap"]  # of gates, where nothing is said
# The same under two names, of which configs may have either or both.
TWICE = {"hidden_size": "embedding_dim", "num_hidden_layers": "num_blocks"}


def read(hf: Config) -> dict[str, Any]:
    need(hf, "use_bias", False)
    need(hf, "add_out_norm", True)
    need(hf, "tie_word_embeddings", False)
    need(hf, "weight_mode", "single")
    need(hf, "eps", EPS)
    for key, other in TWICE.items():
        if hf.get(other) not in (None, need(hf, key)):
            raise ConfigError(
                f"{other}={hf[other]} is not {key}={hf[key]}, of which transformers makes one "
                "model: take the config of this checkpoint"
            )
    width, heads, cap = hf["hidden_size"], need(hf, "num_heads"), _cap(hf, "gate_soft_cap")
    keys, values = (int(width * need(hf, f"{name}_dim_factor")) for name in ("qk", "v"))
    for name, channels in (("qk", keys), ("v", values)):
        if channels % heads or not channels:
            raise ConfigError(
                f"{name}_dim_factor={hf[f'{name}_dim_factor']} gives {channels} channels for "
                f"num_heads={heads}: take the config of this checkpoint"
            )
    return {
        "mixer": MIXER,
        "pattern": (MIXER,),
        "options": "" if cap == CAP else f"cap={cap}",
        "width": width,
        "depth": hf["num_hidden_layers"],
        "vocab": need(hf, "vocab_size"),
        "tied": False,
        "heads": heads,
        "kv_heads": heads,
        "head_size": values // heads,
        "state": keys // heads,
        "expand": values / width,
        "mlp": "swiglu",
        "hidden": _hidden(hf),
        "norm": "rms",
        "norm_eps": need(hf, "norm_eps"),
        "logit_cap": _cap(hf, "output_logit_soft_cap"),
        "positions": positions.config(positions.NoPE()),
    }


def _cap(hf: Config, key: str) -> float:
    """A cap, which a model cannot be without."""
    if need(hf, key) <= 0:
        raise ConfigError(f"{key}={hf[key]} must be more than 0: xLSTM-7B caps gates and logits")
    return float(hf[key])


def _hidden(hf: Config) -> int:
    """The width of the MLP: a multiple of the model's, rounded up."""
    step = need(hf, "ffn_round_up_to_multiple_of")
    if step < 1:
        raise ConfigError(f"ffn_round_up_to_multiple_of={step} must be 1 or more")
    return int((hf["hidden_size"] * need(hf, "ffn_proj_factor") + step - 1) // step * step)


def write(spec: ModelSpec, length: int) -> Config:
    layer = spec.layers[0]
    check_mixer(spec, MIXER, "xLSTM")
    if layer.kv_heads != layer.heads:
        raise ConfigError(f"kv_heads is {layer.heads}, not {layer.kv_heads}")
    return {
        "model_type": "xlstm",
        "hidden_size": spec.width,
        "embedding_dim": spec.width,
        "num_hidden_layers": spec.depth,
        "num_blocks": spec.depth,
        "vocab_size": spec.vocab,
        "tie_word_embeddings": spec.tied,
        "num_heads": layer.heads,
        "qk_dim_factor": _factor(layer.heads * layer.state, spec.width),
        "v_dim_factor": _factor(layer.inner, spec.width),
        # Rounding up to the whole is exact whatever a product of floats is.
        "ffn_proj_factor": layer.hidden / spec.width,
        "ffn_round_up_to_multiple_of": layer.hidden,
        "gate_soft_cap": layer.option("cap"),
        "output_logit_soft_cap": spec.logit_cap,
        "norm_eps": spec.norm_eps,
        "seq_length": length,
    }


def _factor(channels: int, width: int) -> float:
    """What the width times it, cut to a whole number, is the channels."""
    factor = channels / width
    return factor if int(width * factor) == channels else (channels + 0.5) / width


LAYER = "backbone.blocks.{n}"
CELL, MLP = f"{LAYER}.mlstm_layer", f"{LAYER}.ffn"
OURS = {"q": "q", "k": "k", "v": "v", "ogate_preact": "z", "out_proj": "out"}
HALVES = {"proj_up_gate": "gate", "proj_up": "up", "proj_down": "down"}
XLSTM = Family(
    types={"xlstm": "xLSTMForCausalLM"},
    read=read,
    write=write,
    defaults={
        "vocab_size": 50_304,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_heads": 8,
        "use_bias": False,
        "add_out_norm": True,
        "tie_word_embeddings": False,
        "weight_mode": "single",
        "eps": 1e-6,
        "norm_eps": 1e-6,
        "qk_dim_factor": 0.5,
        "v_dim_factor": 1.0,
        "ffn_proj_factor": 2.667,
        "ffn_round_up_to_multiple_of": 64,
        "gate_soft_cap": CAP,
        "output_logit_soft_cap": 30.0,
        "seq_length": 8192,  # of the release; no config says
    },
    weights=(
        Weight("backbone.embeddings.weight", ("embedding/table",), SAME),
        Weight("backbone.out_norm.weight", ("final_norm/scale",), SAME),
        Weight("lm_head.weight", ("head/kernel",), LINEAR),
        Weight(f"{LAYER}.norm_mlstm.weight", ("mixer_norm/scale",), SAME),
        Weight(f"{LAYER}.norm_ffn.weight", ("mlp_norm/scale",), SAME),
        *(Weight(f"{CELL}.{n}.weight", (f"mixer/{at}",), LINEAR) for n, at in OURS.items()),
        *(Weight(f"{MLP}.{n}.weight", (f"mlp/{at}",), LINEAR) for n, at in HALVES.items()),
        Weight(f"{CELL}.multihead_norm.weight", ("mixer/norm/scale",), HEADS),
        *(Weight(f"{CELL}.{n}gate_preact.weight", (f"mixer/{n}",), LINEAR) for n in "if"),
        *(Weight(f"{CELL}.{n}gate_preact.bias", (f"mixer/{n}_bias",), SAME) for n in "if"),
    ),
)
