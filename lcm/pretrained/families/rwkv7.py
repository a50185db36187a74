"""RWKV-7 (arXiv:2503.14456) as flash-linear-attention writes it: two of our layers are one."""

from typing import Any

from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.nn.rwkv7 import RANKS, rank_of
from lcm.pretrained.families.base import LINEAR, SAME, Config, Family, Weight, need, weights
from lcm.pretrained.families.rwkv import HEAD, HEADS, ROW, heads, norms, shape, shape_to_hf

PATTERN = ("rwkv7", "rwkv7_channels")
EPS = "norm_eps"
# Ranks of the small matrices by their keys.
KEYS = {
    "decay": "decay_low_rank_dim",
    "rate": "a_low_rank_dim",
    "value": "v_low_rank_dim",
    "gate": "gate_low_rank_dim",
}


def read(hf: Config) -> dict[str, Any]:
    found = {**shape(hf, PATTERN, eps=EPS), **heads(hf, "head_dim")}
    width = found["width"]
    need(hf, "hidden_act", "sqrelu")
    need(hf, "norm_first", True)
    need(hf, "norm_bias", True)
    need(hf, "attn", None)
    values = hf.get("value_dim") or width
    if any(each != width for each in (values if isinstance(values, list) else [values])):
        raise ConfigError(f"value_dim={values} is not hidden_size={width}, which releases have")
    ranks = ",".join(f"{name}_rank={need(hf, KEYS[name])}" for name in RANKS)
    return {
        **found,
        "hidden": hf.get("intermediate_size") or int(width * need(hf, "hidden_ratio")),
        "kinds": {"rwkv7": {"mixer": "rwkv7", "options": ranks}},
    }


def write(spec: ModelSpec, length: int) -> Config:
    return {
        **shape_to_hf(spec, PATTERN, "rwkv7", "RWKV-7", eps=EPS),
        "head_dim": spec.layers[0].state,
        **{KEYS[name]: rank_of(spec.layers[0], name) for name in RANKS},
        "max_position_embeddings": length,
    }


LAYER = "model.layers.{pair}"
ATTENTION = f"{LAYER}.attn"
# Ours, and theirs: the letter of each small product.
SMALL = {"decay": "w", "rate": "a", "value": "v", "gate": "g"}


def _small(name: str) -> list[Weight]:
    theirs = f"{ATTENTION}.{SMALL[name]}_lora.lora"
    found = [
        Weight(f"{theirs}.0.weight", (f"mixer/{name}_down",), LINEAR),
        Weight(f"{theirs}.2.weight", (f"mixer/{name}_up",), LINEAR),
    ]
    biased = name != "gate"
    return found + [Weight(f"{theirs}.2.bias", (f"mixer/{name}_bias",), SAME)] * biased


RWKV7 = Family(
    types={"rwkv7": "RWKV7ForCausalLM"},
    read=read,
    write=write,
    defaults={
        "hidden_ratio": 4,
        "head_dim": HEAD,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "attn": None,
        "decay_low_rank_dim": 64,
        "gate_low_rank_dim": 128,
        "a_low_rank_dim": 64,
        "v_low_rank_dim": 16,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    },
    weights=(
        Weight("model.embeddings.weight", ("embedding/table",), SAME),
        Weight("lm_head.weight", ("head/kernel",), LINEAR),
        Weight("model.layers.0.pre_norm.weight", ("embedding/norm/scale",), SAME),
        Weight("model.layers.0.pre_norm.bias", ("embedding/norm/bias",), SAME),
        *weights(("model.norm.weight", "final_norm/scale", SAME)),
        *norms(LAYER, ("attn_norm", "ffn_norm"), PATTERN),
        *(Weight(f"{ATTENTION}.x_{n}", (f"mixer/mix_{n}",), ROW, "rwkv7") for n in "rwkvag"),
        *(
            Weight(f"{ATTENTION}.{theirs}_proj.weight", (f"mixer/{ours}",), LINEAR, "rwkv7")
            for theirs, ours in (("r", "r"), ("k", "k"), ("v", "v"), ("o", "out"))
        ),
        *(weight for name in SMALL for weight in _small(name)),
        Weight(f"{ATTENTION}.k_k", ("mixer/erase_scale",), SAME),
        Weight(f"{ATTENTION}.k_a", ("mixer/key_rate",), SAME),
        Weight(f"{ATTENTION}.r_k", ("mixer/bonus",), SAME),
        Weight(f"{ATTENTION}.g_norm.weight", ("mixer/head_norm/scale",), HEADS),
        Weight(f"{ATTENTION}.g_norm.bias", ("mixer/head_norm/bias",), HEADS),
        Weight(f"{LAYER}.ffn.x_k", ("mixer/mix_k",), SAME, "rwkv7_channels"),
        Weight(f"{LAYER}.ffn.key.weight", ("mixer/k",), LINEAR, "rwkv7_channels"),
        Weight(f"{LAYER}.ffn.value.weight", ("mixer/out",), LINEAR, "rwkv7_channels"),
    ),
    unused=(r"^model\.layers\.0\.attn\.v_lora\.",),  # the first layer has its own values
)
