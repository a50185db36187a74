"""The shape of Llama 3.2 1B (config.json of the published weights).

    lcm compile --config configs/llama3_1b.py --topology v5e:4x4 --mesh fsdp=16
    lcm train --config configs/llama3_1b.py --workdir runs/llama3_1b

16 layers of width 2,048, the embedding table tied. Meant for 16 chips of v5e or more.

Rows of 8,192 tokens; `configs/llama3_1b.py:65536` and the like take other lengths, with as many
tokens in a batch as they allow. Shapes are published, weights are not trained here: the corpus is
the default one, so set `data` to yours. 1235.8M parameters, 524.3M tokens in 1000 steps.

Estimated, nothing ran on a chip: compiled for the mesh above a train step takes 7.6 of 16 GiB a
chip, and no less than 2.7 s (memory bounds it): 1,000 steps no less than 0.7 hours.
"""

from ml_collections import ConfigDict

from lcm import config

SHAPE = (
    "model.width=2048",
    "model.depth=16",
    "model.heads=32",
    "model.kv_heads=8",
    "model.hidden=8192",
    "model.tied=True",
    "model.dtype=bfloat16",
    "model.remat=full",
    "model.unroll=1",
    "model.vocab=128256",
    "model.norm_eps=1e-5",
    "model.positions=llama3",
    "model.positions.base=500000.0",
    "model.positions.factor=32.0",
    "model.positions.original=8192",
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
    return config.published("llama3_1b", SHAPE, arg)
