"""Families of models: one file each, and the table of them by `model_type`."""

from typing import Any

from lcm.errors import ConfigError
from lcm.pretrained.families.alibi import BLOOM, MPT
from lcm.pretrained.families.bamba import BAMBA
from lcm.pretrained.families.base import Family
from lcm.pretrained.families.falcon_mamba import FALCON_MAMBA
from lcm.pretrained.families.gemma import GEMMA2, GEMMA3
from lcm.pretrained.families.granite import GRANITE
from lcm.pretrained.families.jamba import JAMBA
from lcm.pretrained.families.kimi_linear import KIMI_LINEAR
from lcm.pretrained.families.lfm2 import LFM2, LFM2_MOE
from lcm.pretrained.families.llama import LLAMA
from lcm.pretrained.families.mamba import MAMBA, MAMBA2
from lcm.pretrained.families.neox import GPT_NEOX
from lcm.pretrained.families.olmo_hybrid import OLMO_HYBRID
from lcm.pretrained.families.phi import PHI3
from lcm.pretrained.families.qwen import QWEN2, QWEN3
from lcm.pretrained.families.qwen_next import QWEN3_5, QWEN3_NEXT
from lcm.pretrained.families.recurrent_gemma import RECURRENT_GEMMA
from lcm.pretrained.families.rwkv4 import RWKV4
from lcm.pretrained.families.rwkv6 import RWKV6
from lcm.pretrained.families.rwkv7 import RWKV7
from lcm.pretrained.families.xlstm import XLSTM
from lcm.pretrained.families.zamba import ZAMBA2

FAMILIES = (LLAMA, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, GPT_NEOX, BLOOM, MPT, MAMBA, MAMBA2)
FAMILIES += (RECURRENT_GEMMA, QWEN3_NEXT, QWEN3_5, RWKV4, RWKV6, RWKV7, ZAMBA2, JAMBA)
FAMILIES += (OLMO_HYBRID, FALCON_MAMBA, XLSTM, BAMBA, GRANITE, KIMI_LINEAR, LFM2, LFM2_MOE)
REGISTRY: dict[str, Family] = {name: family for family in FAMILIES for name in family.types}
ENCODERS = ("t5", "mt5", "umt5", "longt5")


def family_of(hf: dict[str, Any]) -> Family:
    """The family of a `config.json`.

    Raises:
        ConfigError: if there is none, naming those there are.
    """
    kind = hf.get("model_type")
    if kind in ENCODERS:
        raise ConfigError(
            f"model_type={kind} is an encoder and a decoder that reads it, of which lcm has the "
            f"decoder alone: take one of {', '.join(REGISTRY)}"
        )
    if kind not in REGISTRY:
        raise ConfigError(f"model_type={kind!r} is unknown: known are {', '.join(REGISTRY)}")
    return REGISTRY[kind]
