"""Writes golden/rwkv4.npz and its like: what RWKV's own package makes of tiny models.

    pip install rwkv; python -m tests.pretrained.make_rwkv_golden rwkv6
    python -m tests.pretrained.make_rwkv_golden rwkv7

Transformers has RWKV-4 alone. The package reads other names than those of the released folders,
which are those of transformers (4), of RWKV's code for it (6), and those that
flash-linear-attention writes (7).
"""

import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import cases
from .make_golden import FOLDER

WIDTH, LAYERS, HIDDEN, HEADS = 128, 3, 96, 2
RANKS = {"w": 12, "a": 10, "v": 6, "g": 14}
Shapes = dict[str, tuple[int, ...]]


class Tiny(NamedTuple):
    """A model: its config, its tensors, and patterns from their names to those of the package."""

    config: dict[str, Any]
    shapes: Callable[[], Shapes]
    renamed: tuple[tuple[str, str], ...]


def shapes_of_4() -> Shapes:
    """Tensors of a folder."""
    square, row, one = (WIDTH, WIDTH), (WIDTH,), (1, 1, WIDTH)
    found = {"rwkv.embeddings.weight": (cases.VOCAB, WIDTH), "head.weight": (cases.VOCAB, WIDTH)}
    norms = ["rwkv.ln_out", "rwkv.blocks.0.pre_ln"]
    for n in range(LAYERS):
        at, mixing = f"rwkv.blocks.{n}.attention", f"rwkv.blocks.{n}.feed_forward"
        norms += [f"rwkv.blocks.{n}.ln1", f"rwkv.blocks.{n}.ln2"]
        found |= {f"{at}.time_{name}": row for name in ("decay", "first")}
        found |= {f"{at}.time_mix_{name}": one for name in ("key", "value", "receptance")}
        names = "key", "value", "receptance", "output"
        found |= {f"{at}.{name}.weight": square for name in names}
        found |= {f"{mixing}.time_mix_{name}": one for name in ("key", "receptance")}
        found |= {
            f"{mixing}.key.weight": (HIDDEN, WIDTH),
            f"{mixing}.receptance.weight": square,
            f"{mixing}.value.weight": (WIDTH, HIDDEN),
        }
    return found | {f"{norm}.{kind}": row for norm in norms for kind in ("weight", "bias")}


def shapes_of_6() -> Shapes:
    """Tensors of a folder."""
    square, row, one = (WIDTH, WIDTH), (WIDTH,), (1, 1, WIDTH)
    found = {"rwkv.embeddings.weight": (cases.VOCAB, WIDTH), "head.weight": (cases.VOCAB, WIDTH)}
    norms = ["rwkv.ln_out", "rwkv.blocks.0.pre_ln"]
    for n in range(LAYERS):
        at = f"rwkv.blocks.{n}"
        norms += [f"{at}.ln1", f"{at}.ln2", f"{at}.attention.ln_x"]
        found |= {f"{at}.attention.time_maa_{name}": one for name in "xwkvrg"}
        found |= {
            f"{at}.attention.time_maa_w1": (WIDTH, 5 * 32),
            f"{at}.attention.time_maa_w2": (5, 32, WIDTH),
            f"{at}.attention.time_decay": one,
            f"{at}.attention.time_decay_w1": (WIDTH, 64),
            f"{at}.attention.time_decay_w2": (64, WIDTH),
            f"{at}.attention.time_faaaa": (HEADS, WIDTH // HEADS),
        }
        names = "receptance", "key", "value", "gate", "output"
        found |= {f"{at}.attention.{name}.weight": square for name in names}
        found |= {f"{at}.feed_forward.time_maa_{name}": one for name in "kr"}
        found |= {
            f"{at}.feed_forward.key.weight": (HIDDEN, WIDTH),
            f"{at}.feed_forward.receptance.weight": square,
            f"{at}.feed_forward.value.weight": (WIDTH, HIDDEN),
        }
    return found | {f"{norm}.{kind}": row for norm in norms for kind in ("weight", "bias")}


def shapes_of_7() -> Shapes:
    """Tensors of a folder; the first layer has no rank for values of its own."""
    square, row = (WIDTH, WIDTH), (WIDTH,)
    found = {
        "model.embeddings.weight": (cases.VOCAB, WIDTH),
        "lm_head.weight": (cases.VOCAB, WIDTH),
    }
    norms = ["model.norm", "model.layers.0.pre_norm"]
    for n in range(LAYERS):
        at = f"model.layers.{n}"
        norms += [f"{at}.attn_norm", f"{at}.ffn_norm", f"{at}.attn.g_norm"]
        found |= {f"{at}.attn.x_{name}": (1, 1, WIDTH) for name in "rwkvag"}
        found |= {f"{at}.attn.{name}_proj.weight": square for name in "rkvo"}
        found |= {f"{at}.attn.{name}": row for name in ("k_k", "k_a")}
        found[f"{at}.attn.r_k"] = (HEADS, WIDTH // HEADS)
        for name, rank in RANKS.items():
            if n or name != "v":
                lora = f"{at}.attn.{name}_lora.lora"
                found |= {f"{lora}.0.weight": (rank, WIDTH), f"{lora}.2.weight": (WIDTH, rank)}
                found |= {f"{lora}.2.bias": row} if name != "g" else {}
        found |= {f"{at}.ffn.x_k": row, f"{at}.ffn.key.weight": (HIDDEN, WIDTH)}
        found[f"{at}.ffn.value.weight"] = (WIDTH, HIDDEN)
    return found | {f"{norm}.{kind}": row for norm in norms for kind in ("weight", "bias")}


CONFIG_OF_4 = {
    "model_type": "rwkv",
    "vocab_size": cases.VOCAB,
    "hidden_size": WIDTH,
    "attention_hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "context_length": cases.TRAINED,
    **cases.ENDS,
}
CONFIG_OF_6 = {
    "model_type": "rwkv6",
    "vocab_size": cases.VOCAB,
    "hidden_size": WIDTH,
    "attention_hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": cases.TRAINED,
    **cases.ENDS,
}
CONFIG_OF_7 = {
    "model_type": "rwkv7",
    "vocab_size": cases.VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "decay_low_rank_dim": RANKS["w"],
    "a_low_rank_dim": RANKS["a"],
    "v_low_rank_dim": RANKS["v"],
    "gate_low_rank_dim": RANKS["g"],
    "max_position_embeddings": cases.TRAINED,
    **cases.ENDS,
}
OF_4_AND_6 = (
    (r"^rwkv\.", ""),
    (r"^embeddings\.", "emb."),
    (r"\.pre_ln\.", ".ln0."),
    (r"\.attention\.", ".att."),
    (r"\.feed_forward\.", ".ffn."),
)
TINY = {
    "rwkv4": Tiny(
        CONFIG_OF_4,
        shapes_of_4,
        (*OF_4_AND_6, (r"\.time_mix_([kvr])\w+$", r".time_mix_\g<1>")),
    ),
    "rwkv6": Tiny(CONFIG_OF_6, shapes_of_6, OF_4_AND_6),
    "rwkv7": Tiny(
        CONFIG_OF_7,
        shapes_of_7,
        (
            (r"^model\.embeddings\.", "emb."),
            (r"^lm_head\.", "head."),
            (r"^model\.norm\.", "ln_out."),
            (r"^model\.layers\.", "blocks."),
            (r"\.pre_norm\.", ".ln0."),
            (r"\.attn_norm\.", ".ln1."),
            (r"\.ffn_norm\.", ".ln2."),
            (r"\.attn\.", ".att."),
            (r"\.g_norm\.", ".ln_x."),
            (r"\.r_proj\.", ".receptance."),
            (r"\.k_proj\.", ".key."),
            (r"\.v_proj\.", ".value."),
            (r"\.o_proj\.", ".output."),
            (r"\.([wavg])_lora\.lora\.0\.weight$", r".\g<1>1"),
            (r"\.([wavg])_lora\.lora\.2\.weight$", r".\g<1>2"),
            (r"\.([wav])_lora\.lora\.2\.bias$", r".\g<1>0"),
        ),
    ),
}


def computed(name: str) -> np.ndarray:
    """float32 logits `[2, L, V]` of `cases.tokens()`."""
    import torch

    seventh = str(int(name == "rwkv7"))
    os.environ |= {"RWKV_V7_ON": seventh, "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    from rwkv.model import RWKV

    tiny, tensors = TINY[name], {}
    for key, shape in tiny.shapes().items():
        tensor = torch.from_numpy(cases.tensor(key, shape))
        tensor = tensor.T.contiguous() if "_lora" in key and tensor.ndim == 2 else tensor
        for pattern, replacement in tiny.renamed:
            key = re.sub(pattern, replacement, key)
        tensors[key] = tensor
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.save(tensors, pathlib.Path(folder, "tiny.pth"))
        model = RWKV(model=f"{folder}/tiny", strategy="cpu fp32")
        rows = [model.forward(row.tolist(), None, full_output=True)[0] for row in cases.tokens()]
    return np.stack([row.float().numpy() for row in rows])


if __name__ == "__main__":
    for name in sys.argv[1:]:  # one each time: which version is decided when the package is loaded
        np.savez_compressed(FOLDER / f"{name}.npz", logits=computed(name))
