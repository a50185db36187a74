"""The shape of RecurrentGemma 9B (Botev et al., 2024, arXiv:2404.07839).

    lcm compile --config configs/recurrentgemma_9b.py --topology v5p:4x4x4 --mesh fsdp=64
    lcm train --config configs/recurrentgemma_9b.py --workdir runs/recurrentgemma_9b

38 layers of width 4,096, two gated linear recurrences to one layer of local attention. Meant for
64 chips of v5p.

Rows of 8,192 tokens; `configs/recurrentgemma_9b.py:65536` and the like take other lengths, with
as many tokens in a batch as they allow. Shapes are published, weights are not trained here: the
corpus is the default one, so set `data` to yours. 8580.0M parameters, 2097.2M tokens in 1000
steps.

Estimated, nothing ran on a chip: compiled for the mesh above a train step takes 34.1 of 95 GiB a
chip, and no less than 4.9 s (compute bounds it): 1,000 steps no less than 1.4 hours.
"""

from ml_collections import ConfigDict

from lcm import config

SHAPE = (
    "model.width=4096",
    "model.depth=38",
    "model.pattern=rglru,rglru,local",
    "model.mlp=geglu",
    "model.hidden=12288",
    "model.heads=16",
    "model.biases=all",
    "model.kinds.rglru.mixer=rglru",
    "model.kinds.rglru.expand=1.0",
    "model.kinds.local.mixer=attention",
    "model.kinds.local.kv_heads=1",
    "model.kinds.local.head_size=256",
    "model.kinds.local.window=2048",
    "model.tied=True",
    "model.logit_cap=30.0",
    "model.embed_scale=64.0",
    "model.dtype=bfloat16",
    "model.remat=full",
    "model.unroll=1",
    "model.vocab=256000",
    "model.norm_eps=1e-5",
    "model.positions=rope",
    "data.length=8192",
    "train.batch=256",
    "train.steps=1000",
    "train.lr=3e-4",
    "train.warmup=200",
    "mesh.data=1",
    "mesh.fsdp=-1",
    "model.positions.fraction=0.5",
)


def get_config(arg: str = "") -> ConfigDict:
    """`""`, the tokens of a row such as `"65536"`, or `"tiny"` for a run of seconds."""
    return config.published("recurrentgemma_9b", SHAPE, arg)
