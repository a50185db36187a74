"""Writes golden/rwkv7.npz: what RWKV's own package makes of a tiny model.

    pip install rwkv; python -m tests.pretrained.make_rwkv_golden

Transformers has no RWKV-7. The package reads other names than those of the released folders, which
are the ones that flash-linear-attention writes; from one to the other:
"""

import os
import pathlib
import re
import tempfile

import numpy as np

from . import cases
from .make_golden import FOLDER

WIDTH, LAYERS, HIDDEN = 128, 3, 96
RANKS = {"w": 12, "a": 10, "v": 6, "g": 14}
CONFIG = {
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


def shapes() -> dict[str, tuple[int, ...]]:
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
        found[f"{at}.attn.r_k"] = (WIDTH // 64, 64)
        for name, rank in RANKS.items():
            if n or name != "v":
                lora = f"{at}.attn.{name}_lora.lora"
                found |= {f"{lora}.0.weight": (rank, WIDTH), f"{lora}.2.weight": (WIDTH, rank)}
                found |= {f"{lora}.2.bias": row} if name != "g" else {}
        found |= {f"{at}.ffn.x_k": row, f"{at}.ffn.key.weight": (HIDDEN, WIDTH)}
        found[f"{at}.ffn.value.weight"] = (WIDTH, HIDDEN)
    return found | {f"{norm}.{kind}": row for norm in norms for kind in ("weight", "bias")}


RENAMED = (
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
)


def computed() -> np.ndarray:
    """float32 logits `[2, L, V]` of `cases.tokens()`."""
    import torch

    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    from rwkv.model import RWKV

    tensors = {}
    for name, shape in shapes().items():
        tensor = torch.from_numpy(cases.tensor(name, shape))
        tensor = tensor.T.contiguous() if "_lora" in name and tensor.ndim == 2 else tensor
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.save(tensors, pathlib.Path(folder, "tiny.pth"))
        model = RWKV(model=f"{folder}/tiny", strategy="cpu fp32")
        rows = [model.forward(row.tolist(), None, full_output=True)[0] for row in cases.tokens()]
    return np.stack([row.float().numpy() for row in rows])


if __name__ == "__main__":
    np.savez_compressed(FOLDER / "rwkv7.npz", logits=computed())
