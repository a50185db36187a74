"""Falcon-Mamba (arXiv:2410.05355): Mamba whose steps, b and c are normalised, without scales."""

from typing import Any

from lcm.models import ModelSpec
from lcm.pretrained.families import mamba
from lcm.pretrained.families.base import Config, Family, need


def read(hf: Config) -> dict[str, Any]:
    inside, outside = need(hf, "mixer_rms_eps"), need(hf, "layer_norm_epsilon")
    own = [] if inside == outside else [f"eps={inside}"]
    return mamba.read_mamba1(hf, "normed=True", "scaled=False", *own)


def write(spec: ModelSpec, length: int) -> Config:
    hf = mamba.write_mamba1(spec, length)
    eps = spec.layers[0].option("eps") or spec.norm_eps
    return {**hf, "model_type": "falcon_mamba", "mixer_rms_eps": eps}


FALCON_MAMBA: Family = mamba.MAMBA._replace(
    types={"falcon_mamba": "FalconMambaForCausalLM"},
    read=read,
    write=write,
    defaults={**mamba.MAMBA.defaults, "mixer_rms_eps": 1e-6},
)
