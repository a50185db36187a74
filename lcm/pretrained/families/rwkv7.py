"""RWKV-7 (arXiv:2503.14456) as flash-linear-attention writes it: two of our layers are one."""

from typing import Any

from lcm import positions
from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.nn.rwkv7 import RANKS, rank_of
from lcm.pretrained.families.base import (
    LINEAR,
    SAME,
    Config,
    Family,
    Form,
    Weight,
    need,
    weights,
)

PATTERN = ("rwkv7", "rwkv7_channels")
HEAD = 64  # channels, of all releases
# Ranks of the small matrices by their keys.
KEYS = {
    "decay": "decay_low_rank_dim",
    "rate": "a_low_rank_dim",
    "value": "v_low_rank_dim",
    "gate": "gate_low_rank_dim",
}
# A vector with two axes of 1 before it, and one of all heads.
ROW = Form(lambda tensor, *_: [tensor.reshape(-1)], lambda ours, _: ours[0].reshape(1, 1, -1))
HEADS = Form(
    lambda tensor, _, layer: [tensor.reshape(layer.heads, -1)],
    lambda ours, _: ours[0].reshape(-1),
)


def read(hf: Config) -> dict[str, Any]:
    width = need(hf, "hidden_size")
    need(hf, "head_dim", HEAD)
    need(hf, "hidden_act", "sqrelu")
    need(hf, "norm_first", True)
    need(hf, "norm_bias", True)
    need(hf, "attn", None)
    if width % HEAD:
        raise ConfigError(f"hidden_size={width} is no multiple of head_dim={HEAD}")
    values = hf.get("value_dim") or width
    if any(each != width for each in (values if isinstance(values, list) else [values])):
        raise ConfigError(f"value_dim={values} is not hidden_size={width}, which releases have")
    hidden = hf.get("intermediate_size") or int(width * need(hf, "hidden_ratio"))
    return {
        "mixer": "rwkv7",
        "pattern": PATTERN,
        "mlp": "none",
        "width": width,
        "depth": 2 * need(hf, "num_hidden_layers"),
        "hidden": hidden,
        "heads": width // HEAD,
        "state": HEAD,
        "expand": 1.0,
        "vocab": need(hf, "vocab_size"),
        "tied": bool(need(hf, "tie_word_embeddings")),
        "norm": "layer",
        "norm_eps": need(hf, "norm_eps"),
        "embed_norm": True,
        "kinds": {
            "rwkv7": {
                "mixer": "rwkv7",
                "options": ",".join(f"{name}_rank={need(hf, KEYS[name])}" for name in RANKS),
            }
        },
        "positions": positions.config(positions.NoPE()),
    }


def write(spec: ModelSpec, length: int) -> Config:
    mixers = tuple(layer.mixer for layer in spec.layers)
    if mixers != PATTERN:
        raise ConfigError(f"layers are {', '.join(mixers)}, those of RWKV-7 {', '.join(PATTERN)}")
    time, channels = spec.layers
    return {
        "model_type": "rwkv7",
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth // 2,
        "intermediate_size": channels.hidden or 4 * spec.width,
        "head_dim": time.state,
        "vocab_size": spec.vocab,
        "tie_word_embeddings": spec.tied,
        "norm_eps": spec.norm_eps,
        "max_position_embeddings": length,
        **{KEYS[name]: rank_of(time, name) for name in RANKS},
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
        *(
            Weight(f"{LAYER}.{theirs}.{kind}", (f"mixer_norm/{ours}",), SAME, mixer)
            for theirs, mixer in zip(("attn_norm", "ffn_norm"), PATTERN, strict=True)
            for kind, ours in (("weight", "scale"), ("bias", "bias"))
        ),
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
