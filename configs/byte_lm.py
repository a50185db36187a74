"""A byte-level decoder on the standard library: the config to start from.

    lcm train --config configs/byte_lm.py --workdir runs/byte_lm
    lcm evaluate runs/byte_lm

0.9M parameters, 8.2M tokens.
"""

from ml_collections import ConfigDict

from lcm import config


def get_config(arg: str = "") -> ConfigDict:
    """`""` as described above, `"tiny"` for a run of seconds."""
    cfg = config.base()
    cfg.name = "byte_lm"
    cfg.train.steps = 2000
    if arg == "tiny":
        config.shrink(cfg)
    elif arg:
        raise config.unknown_argument(arg, "tiny")
    return cfg
