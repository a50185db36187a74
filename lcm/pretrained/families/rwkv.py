"""What folders of all RWKV have alike: two of our layers are one of theirs."""

from typing import Any

from lcm import positions
from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.pretrained.families.base import SAME, Config, Form, Weight, need

HEAD = 64  # channels, of all releases
# A vector with two axes of 1 before it, and one of all heads.
ROW = Form(lambda tensor, *_: [tensor.reshape(-1)], lambda ours, _: ours[0].reshape(1, 1, -1))
HEADS = Form(
    lambda tensor, _, layer: [tensor.reshape(layer.heads, -1)],
    lambda ours, _: ours[0].reshape(-1),
)


def shape(hf: Config, pattern: tuple[str, str], *, eps: str) -> dict[str, Any]:
    """All but heads and the width of channel mixing; `eps` is the key of what norms add."""
    return {
        "mixer": pattern[0],
        "pattern": pattern,
        "mlp": "none",
        "width": need(hf, "hidden_size"),
        "depth": 2 * need(hf, "num_hidden_layers"),
        "vocab": need(hf, "vocab_size"),
        "tied": bool(need(hf, "tie_word_embeddings")),
        "norm": "layer",
        "norm_eps": need(hf, eps),
        "embed_norm": True,
        "positions": positions.config(positions.NoPE()),
    }


def heads(hf: Config, key: str) -> dict[str, Any]:
    """Those of RWKV-6 and RWKV-7; `key` is that of the channels of one.

    Raises:
        ConfigError: for heads that no release has.
    """
    width = need(hf, "hidden_size")
    need(hf, key, HEAD)
    if width % HEAD:
        raise ConfigError(f"hidden_size={width} is no multiple of {key}={HEAD}")
    return {"heads": width // HEAD, "state": HEAD, "expand": 1.0}


def shape_to_hf(
    spec: ModelSpec, pattern: tuple[str, str], kind: str, name: str, *, eps: str
) -> Config:
    """The inverse of `shape`, of a `model_type`, with the width of channel mixing.

    Raises:
        ConfigError: for other layers than those of the version called `name`.
    """
    mixers = tuple(layer.mixer for layer in spec.layers)
    if mixers != pattern:
        raise ConfigError(f"layers are {', '.join(mixers)}, those of {name} {', '.join(pattern)}")
    return {
        "model_type": kind,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth // 2,
        "intermediate_size": spec.layers[1].hidden or 4 * spec.width,
        "vocab_size": spec.vocab,
        "tie_word_embeddings": spec.tied,
        eps: spec.norm_eps,
    }


def norms(layer: str, names: tuple[str, str], pattern: tuple[str, str]) -> list[Weight]:
    """Those before time mixing and before channel mixing, by their names below a layer."""
    return [
        Weight(f"{layer}.{theirs}.{kind}", (f"mixer_norm/{ours}",), SAME, mixer)
        for theirs, mixer in zip(names, pattern, strict=True)
        for kind, ours in (("weight", "scale"), ("bias", "bias"))
    ]
