"""The shape of Samba 1.3B (Ren et al., 2024, arXiv:2406.07522; lit_gpt/config.py of its code).

    lcm compile --config configs/samba_1p3b.py --topology v5p:2x2x4 --mesh fsdp=16
    lcm train --config configs/samba_1p3b.py --workdir runs/samba_1p3b

18 layers of width 2,304, Mamba and attention in a window of 2,048 by turns, an MLP after each.
Meant for 16 chips of v5p.

Rows of 4,096 tokens, the published length; `configs/samba_1p3b.py:65536` and the like take other
lengths, with as many tokens in a batch as they allow. Shapes are published, weights are not
trained here: the corpus is the default one, so set `data` to yours.
1330.2M parameters, 262.1M tokens in 1000 steps.

Estimated, nothing ran on a chip: compiled for the mesh above a train step takes 7.1 of 95 GiB a
chip, and no less than 1.5 s (memory bounds it): 1,000 steps no less than 0.4 hours.
"""

from ml_collections import ConfigDict

from lcm import config

SHAPE = (
    "model.width=2304",
    "model.depth=18",
    "model.pattern=mamba,local",
    "model.hidden=6144",
    "model.heads=18",
    "model.kinds.mamba.mixer=mamba1",
    "model.kinds.mamba.state=16",
    "model.kinds.local.mixer=attention",
    "model.kinds.local.window=2048",
    "model.tied=True",
    "model.dtype=bfloat16",
    "model.remat=full",
    "model.unroll=1",
    "model.vocab=32000",
    "model.norm_eps=1e-5",
    "model.positions=rope",
    "data.length=4096",
    "train.batch=64",
    "train.steps=1000",
    "train.lr=4e-4",
    "train.warmup=200",
    "mesh.data=1",
    "mesh.fsdp=-1",
)


def get_config(arg: str = "") -> ConfigDict:
    """`""`, the tokens of a row such as `"65536"`, or `"tiny"` for a run of seconds."""
    return config.published("samba_1p3b", SHAPE, arg)
