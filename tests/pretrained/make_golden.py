"""Writes golden/: what transformers makes of the tiny models of cases.py.

    python -m tests.pretrained.make_golden CASE...

Run it again only for new cases, or without any to see what a new release of transformers changed.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np

from . import cases

FOLDER = pathlib.Path(__file__).with_name("golden")
# Before, at and beyond the windows and the trained length; the last one.
PLACES = (0, 1, 6, 7, 8, 15, 16, 17, 25, 39)


def reference(name: str):
    """The model of transformers with our weights."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(cases.CONFIGS[name])))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        stored, kind = model.state_dict(), cases.CONFIGS[name]["model_type"]
        buffers = [(key, x) for key, x in model.named_buffers() if key in stored]
        for key, parameter in [*model.named_parameters(), *buffers]:
            parameter.copy_(torch.from_numpy(_filled(kind, _stored(kind, key), parameter.shape)))
    return model.eval()


def logits(model, tokens: np.ndarray) -> np.ndarray:
    """float32 `[B, L, V]` of a model of transformers, without its cache."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens), use_cache=False).logits.numpy()


STORED = {
    "gpt_neox": {"lm_head.": "embed_out."},
    "olmo_hybrid": {
        ".input_layernorm.": ".attention_layer_norm.",
        ".post_attention_layernorm.": ".feedforward_layer_norm.",
        ".conv1d.": ".qkv_conv1d.",
    },
    "kimi_linear": {
        ".mlp.": ".block_sparse_moe.",
        ".forget_gate.": ".",
        ".conv1d.": ".qkv_conv1d.",
    },
}


def _stored(kind: str, key: str) -> str:
    """The name that a file of such a model has for a parameter."""
    for ours, theirs in STORED.get(kind, {}).items():
        key = key.replace(ours, theirs)
    return key


HALVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
NUMBERED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
PARTS = {"kimi_linear": NUMBERED, "lfm2_moe": NUMBERED}  # of experts


def _filled(kind: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter's tensor; of all experts from those of each, which files have, and of q, k and v
    likewise."""
    if ".qkv_conv1d." in key:
        own = shape[0] // 3, *shape[1:]
        return np.concatenate([cases.tensor(key.replace(".qkv_", f".{n}_"), own) for n in "qkv"])
    if ".experts." not in key:
        return cases.tensor(key, shape)
    home, _, what = key.rpartition(".")
    halves, (count, rows, columns) = PARTS.get(kind, HALVES)[what], shape
    size = rows // len(halves), columns
    tensors = [
        [cases.tensor(f"{home}.{e}.{half}.weight", size) for half in halves] for e in range(count)
    ]
    return np.stack([np.concatenate(each) for each in tensors])


def computed(name: str) -> tuple[np.ndarray, dict[str, list[int]]]:
    """Logits at PLACES, and the shapes of the tensors that transformers saves."""
    from safetensors import safe_open

    model = reference(name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(f"{folder}/model.safetensors", "numpy") as file:
            keys = file.keys()
            shapes = {key: file.get_slice(key).get_shape() for key in keys}
    return logits(model, cases.tokens())[:, PLACES], shapes


def main(*names: str) -> None:
    import transformers

    kept = dict(np.load(FOLDER / "logits.npz")) if names else {}
    sizes = json.loads((FOLDER / "shapes.json").read_text()) if names else {}
    new = {name: computed(name) for name in names or cases.CONFIGS}
    found = {n: new[n] if n in new else (kept[n], sizes[n]) for n in cases.CONFIGS}
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / "logits.npz", **{name: x for name, (x, _) in found.items()})
    lines = [f"  {json.dumps(name)}: {json.dumps(shapes)}" for name, (_, shapes) in found.items()]
    text = ",\n".join([f'  "transformers": "{transformers.__version__}"', *lines])
    (FOLDER / "shapes.json").write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
