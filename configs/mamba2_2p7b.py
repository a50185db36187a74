"""The shape of Mamba-2 2.7B (Dao and Gu, 2024, arXiv:2405.21060; the published config).

    lcm compile --config configs/mamba2_2p7b.py --topology v5e:8x8 --mesh fsdp=64
    lcm train --config configs/mamba2_2p7b.py --workdir runs/mamba2_2p7b

64 layers of width 2,560 with 80 heads of 64 and a state of 128, no attention, no MLP. Meant for
64 chips of v5e.

Rows of 8,192 tokens; `configs/mamba2_2p7b.py:65536` and the like take other lengths, with as many
tokens in a batch as they allow. Shapes are published, weights are not trained here: the corpus is
the default one, so set `data` to yours. 2702.6M parameters, 524.3M tokens in 1000 steps.

Estimated, nothing ran on a chip: compiled for the mesh above a train step takes 5.2 of 16 GiB a
chip, and no less than 1.0 s (memory bounds it): 1,000 steps no less than 0.3 hours.
"""

from ml_collections import ConfigDict

from lcm import config

SHAPE = (
    "model.width=2560",
    "model.depth=64",
    "model.pattern=mamba2",
    "model.mlp=none",
    "model.heads=80",
    "model.state=128",
    "model.tied=True",
    "model.dtype=bfloat16",
    "model.remat=full",
    "model.unroll=1",
    "model.vocab=50288",
    "model.norm_eps=1e-5",
    "data.length=8192",
    "train.batch=64",
    "train.steps=1000",
    "train.lr=3e-4",
    "train.warmup=200",
    "mesh.data=1",
    "mesh.fsdp=-1",
)


def get_config(arg: str = "") -> ConfigDict:
    """`""`, the tokens of a row such as `"65536"`, or `"tiny"` for a run of seconds."""
    return config.published("mamba2_2p7b", SHAPE, arg)
