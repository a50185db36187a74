"""RWKV-6 (arXiv:2404.05892) as its releases for transformers write it: two of our layers are one.

Their code divides the stream by 2 every `rescale_every` layers, and matrices with it, against the
range of float16. Files hold the matrices as they were, and a norm begins what reads the stream.
"""

from typing import Any

from lcm.models import ModelSpec
from lcm.pretrained.families.base import LINEAR, SAME, Config, Family, Weight, need, weights
from lcm.pretrained.families.rwkv import HEAD, HEADS, ROW, heads, norms, shape, shape_to_hf

PATTERN = TIME, CHANNELS = "rwkv6", "rwkv6_channels"
EPS = "layer_norm_epsilon"


def read(hf: Config) -> dict[str, Any]:
    found = {**shape(hf, PATTERN, eps=EPS), **heads(hf, "head_size")}
    width = found["width"]
    need(hf, "head_size_divisor", 8)  # of which follows the epsilon of the norm by head
    need(hf, "attention_hidden_size", None, width)
    return {**found, "hidden": hf.get("intermediate_size") or int(width * 3.5) // 32 * 32}


def write(spec: ModelSpec, length: int) -> Config:
    return {
        **shape_to_hf(spec, PATTERN, "rwkv6", "RWKV-6", eps=EPS),
        "head_size": spec.layers[0].state,
        "attention_hidden_size": spec.layers[0].inner,
        "max_position_embeddings": length,
    }


LAYER = "rwkv.blocks.{pair}"
ATTENTION, MIXING = f"{LAYER}.attention", f"{LAYER}.feed_forward"
PROJECTIONS = (("receptance", "r"), ("key", "k"), ("value", "v"), ("gate", "g"), ("output", "out"))

RWKV6 = Family(
    types={"rwkv6": "Rwkv6ForCausalLM"},
    read=read,
    write=write,
    defaults={
        "head_size": HEAD,
        "head_size_divisor": 8,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    },
    weights=(
        Weight("rwkv.embeddings.weight", ("embedding/table",), SAME),
        Weight("head.weight", ("head/kernel",), LINEAR),
        *weights(("rwkv.blocks.0.pre_ln.weight", "embedding/norm/scale", SAME)),
        *weights(("rwkv.ln_out.weight", "final_norm/scale", SAME)),
        *norms(LAYER, ("ln1", "ln2"), PATTERN),
        *(Weight(f"{ATTENTION}.time_maa_{n}", (f"mixer/mix_{n}",), ROW, TIME) for n in "xwkvrg"),
        Weight(f"{ATTENTION}.time_maa_w1", ("mixer/mix_down",), SAME),
        Weight(f"{ATTENTION}.time_maa_w2", ("mixer/mix_up",), SAME),
        Weight(f"{ATTENTION}.time_decay", ("mixer/decay_bias",), ROW),
        Weight(f"{ATTENTION}.time_decay_w1", ("mixer/decay_down",), SAME),
        Weight(f"{ATTENTION}.time_decay_w2", ("mixer/decay_up",), SAME),
        Weight(f"{ATTENTION}.time_faaaa", ("mixer/bonus",), SAME),
        *(
            Weight(f"{ATTENTION}.{theirs}.weight", (f"mixer/{ours}",), LINEAR, TIME)
            for theirs, ours in PROJECTIONS
        ),
        Weight(f"{ATTENTION}.ln_x.weight", ("mixer/head_norm/scale",), HEADS),
        Weight(f"{ATTENTION}.ln_x.bias", ("mixer/head_norm/bias",), HEADS),
        *(Weight(f"{MIXING}.time_maa_{n}", (f"mixer/mix_{n}",), ROW, CHANNELS) for n in "kr"),
        *(
            Weight(f"{MIXING}.{theirs}.weight", (f"mixer/{ours}",), LINEAR, CHANNELS)
            for theirs, ours in (("key", "k"), ("receptance", "r"), ("value", "out"))
        ),
    ),
)
