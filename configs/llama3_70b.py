"""The shape of Llama 3.1 70B (Llama team, 2024, arXiv:2407.21783, table 3).

    lcm compile --config configs/llama3_70b.py --topology v5p:8x8x8 --mesh fsdp=512
    lcm train --config configs/llama3_70b.py --workdir runs/llama3_70b

80 layers of width 8,192. Meant for 512 chips of v5p.

Rows of 8,192 tokens; `configs/llama3_70b.py:65536` and the like take other lengths, with as many
tokens in a batch as they allow. Shapes are published, weights are not trained here: the corpus is
the default one, so set `data` to yours. 70553.7M parameters, 4194.3M tokens in 1000 steps.

Estimated, nothing ran on a chip: compiled for the mesh above a train step takes 18.4 of 95 GiB a
chip, and no less than 11.1 s (compute bounds it): 1,000 steps no less than 3.1 hours.
"""

from ml_collections import ConfigDict

from lcm import config

SHAPE = (
    "model.width=8192",
    "model.depth=80",
    "model.heads=64",
    "model.kv_heads=8",
    "model.hidden=28672",
    "model.tied=False",
    "model.dtype=bfloat16",
    "model.remat=full",
    "model.unroll=1",
    "model.vocab=128256",
    "model.norm_eps=1e-5",
    "model.positions=llama3",
    "model.positions.base=500000.0",
    "model.positions.factor=8.0",
    "model.positions.original=8192",
    "data.length=8192",
    "train.batch=512",
    "train.steps=1000",
    "train.lr=3e-4",
    "train.warmup=200",
    "mesh.data=1",
    "mesh.fsdp=-1",
)


def get_config(arg: str = "") -> ConfigDict:
    """`""`, the tokens of a row such as `"65536"`, or `"tiny"` for a run of seconds."""
    return config.published("llama3_70b", SHAPE, arg)
