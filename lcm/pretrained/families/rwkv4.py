"""RWKV-4 (arXiv:2305.13048) as transformers has it: two of our layers are one of theirs.

In evaluation transformers divides the stream by 2 after every `rescale_every` layers, and the
matrices that write to it so that it stays in the range of float16. Files hold the matrices as they
were. All that reads the stream begins with a norm, which takes the factor back; but not in what it
adds to the variance, so that their logits are those of a model whose epsilon is 4 times as large
after each division. Here it is as in training, which is what they compute with `rescale_every=0`:
of a stream whose variance is about 1 and an epsilon of 1e-5 that is the same to 1e-4.
"""

from typing import Any

from lcm.models import ModelSpec
from lcm.pretrained.families.base import LINEAR, SAME, Config, Family, Form, Weight, need, weights
from lcm.pretrained.families.rwkv import norms, shape, shape_to_hf

PATTERN = TIME, CHANNELS = "rwkv4", "rwkv4_channels"
EPS = "layer_norm_epsilon"
# The share of the token itself, and here that of the one before.
REST = Form(
    lambda tensor, *_: [1 - tensor.reshape(-1)], lambda ours, _: (1 - ours[0]).reshape(1, 1, -1)
)


def read(hf: Config) -> dict[str, Any]:
    need(hf, EPS, 1e-5)  # the last norm of transformers has it whatever a config says
    found = shape(hf, PATTERN, eps=EPS)
    width = found["width"]
    return {
        **found,
        "heads": 1,
        "expand": (hf.get("attention_hidden_size") or width) / width,
        "hidden": hf.get("intermediate_size") or 4 * width,
    }


def write(spec: ModelSpec, length: int) -> Config:
    return {
        **shape_to_hf(spec, PATTERN, "rwkv", "RWKV-4", eps=EPS),
        "attention_hidden_size": spec.layers[0].inner,
        "context_length": length,
    }


LAYER = "rwkv.blocks.{pair}"
ATTENTION, MIXING = f"{LAYER}.attention", f"{LAYER}.feed_forward"
MIXED = (("key", "k"), ("value", "v"), ("receptance", "r"))

RWKV4 = Family(
    types={"rwkv": "RwkvForCausalLM"},
    read=read,
    write=write,
    defaults={EPS: 1e-5, "tie_word_embeddings": False, "context_length": 1024},
    weights=(
        Weight("rwkv.embeddings.weight", ("embedding/table",), SAME),
        Weight("head.weight", ("head/kernel",), LINEAR),
        *weights(("rwkv.blocks.0.pre_ln.weight", "embedding/norm/scale", SAME)),
        *weights(("rwkv.ln_out.weight", "final_norm/scale", SAME)),
        *norms(LAYER, ("ln1", "ln2"), PATTERN),
        Weight(f"{ATTENTION}.time_decay", ("mixer/A_log",), SAME),
        Weight(f"{ATTENTION}.time_first", ("mixer/bonus",), SAME),
        *(
            Weight(f"{ATTENTION}.time_mix_{theirs}", (f"mixer/mix_{ours}",), REST, TIME)
            for theirs, ours in MIXED
        ),
        *(
            Weight(f"{ATTENTION}.{theirs}.weight", (f"mixer/{ours}",), LINEAR, TIME)
            for theirs, ours in (*MIXED, ("output", "out"))
        ),
        *(
            Weight(f"{MIXING}.time_mix_{theirs}", (f"mixer/mix_{ours}",), REST, CHANNELS)
            for theirs, ours in (MIXED[0], MIXED[2])
        ),
        *(
            Weight(f"{MIXING}.{theirs}.weight", (f"mixer/{ours}",), LINEAR, CHANNELS)
            for theirs, ours in (("key", "k"), ("receptance", "r"), ("value", "out"))
        ),
    ),
)
