"""The quickstart's decoders: train at 256 bytes, read 2,048.

    lcm reproduce quickstart
    lcm train --config configs/quickstart.py:alibi --workdir runs/alibi

0.3M parameters, 2.0M tokens; 40 seconds on 2 cores. Expect 1.7 to 1.8 nats per byte at 256 bytes,
and past it a rise by more than a nat with rope, none with alibi (measured:
experiments/quickstart/README.md).
"""

from ml_collections import ConfigDict

from lcm import config, positions


def get_config(arg: str = "rope") -> ConfigDict:
    """A position encoding's name (rope), or `NAME,tiny` or `tiny` for a run of seconds."""
    words = [word for word in arg.split(",") if word]
    name, *rest = [word for word in words if word != "tiny"] or ["rope"]
    if rest:
        raise config.unknown_argument(rest[0], "tiny")
    cfg = config.base()
    cfg.name = name
    cfg.model.positions = ConfigDict(positions.config(name))
    cfg.model.update(width=96, depth=2, heads=4)
    cfg.train.update(batch=8, steps=1000, warmup=100)
    cfg.eval.tokens = 65_536
    if "tiny" in words:
        config.shrink(cfg)
    return cfg
