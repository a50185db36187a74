"""Layers with and without positions in turn: three published patterns on the byte-level decoder.

    lcm train --config configs/interleaved.py:irope --workdir runs/irope
    lcm evaluate runs/irope

Every fourth layer has no positions and sees everything; the others rotate and, but for SmolLM3, see
what is near. Distances are those of the papers scaled to rows of 256: a chunk or window of half a
row where theirs is 8,192 or 4,096.

    irope      chunked local attention and RoPE; without positions a temperature (Llama 4, 2025)
    rnope_swa  a sliding window and RoPE (Yang et al., 2025, arXiv:2501.18795; Command R7B)
    smollm3    RoPE and full attention everywhere (SmolLM3, 2025)

0.9M parameters, 8.2M tokens; six minutes on 2 cores.
"""

from ml_collections import ConfigDict

from lcm import config

NEAR = 128  # tokens of a chunk or a window
PATTERNS: dict[str, tuple[str, ...]] = {
    "irope": (
        "model.positions=chunked+rope",
        f"model.positions.first.size={NEAR}",
        "model.kinds.bare.positions=floor_scale+nope",
        f"model.kinds.bare.positions.first.floor={NEAR}",
    ),
    "rnope_swa": (f"model.window={NEAR}", "model.kinds.bare.window=0"),
    "smollm3": (),
}


def get_config(arg: str = "irope") -> ConfigDict:
    """A pattern's name (irope), or `NAME,tiny` or `tiny` for a run of seconds."""
    words = [word for word in arg.split(",") if word]
    name, *rest = [word for word in words if word != "tiny"] or ["irope"]
    if rest or name not in PATTERNS:
        raise config.unknown_argument(arg, *PATTERNS, "tiny")
    cfg = config.override(
        config.base(),
        [
            "model.pattern=attention,attention,attention,bare",
            "model.kinds.bare.mixer=attention",
            "model.kinds.bare.positions=nope",
            *PATTERNS[name],
            "train.steps=2000",
        ],
    )
    cfg.name = name
    if "tiny" in words:
        config.shrink(cfg)
    return cfg
