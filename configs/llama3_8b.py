"""The shape of Llama 3.1 8B (Llama team, 2024, arXiv:2407.21783, table 3).

    lcm compile --config configs/llama3_8b.py --topology v5p:4x4x4 --mesh fsdp=64
    lcm train --config configs/llama3_8b.py --workdir runs/llama3_8b

32 layers of width 4,096; Adam's state is float32 and computation bfloat16. Meant for 64 chips of
v5p.

Rows of 8,192 tokens; `configs/llama3_8b.py:65536` and the like take other lengths, with as many
tokens in a batch as they allow. Shapes are published, weights are not trained here: the corpus is
the default one, so set `data` to yours. 8030.3M parameters, 2097.2M tokens in 1000 steps.

Estimated, nothing ran on a chip: compiled for the mesh above a train step takes 17.5 of 95 GiB a
chip, and no less than 5.2 s (compute bounds it): 1,000 steps no less than 1.4 hours.
"""

from ml_collections import ConfigDict

from lcm import config

SHAPE = (
    "model.width=4096",
    "model.depth=32",
    "model.heads=32",
    "model.kv_heads=8",
    "model.hidden=14336",
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
    "train.batch=256",
    "train.steps=1000",
    "train.lr=3e-4",
    "train.warmup=200",
    "mesh.data=1",
    "mesh.fsdp=-1",
)


def get_config(arg: str = "") -> ConfigDict:
    """`""`, the tokens of a row such as `"65536"`, or `"tiny"` for a run of seconds."""
    return config.published("llama3_8b", SHAPE, arg)
