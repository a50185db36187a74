"""Length in language models, in JAX.

The names below are imported when first used, so that `import lcm` costs nothing.
"""

import importlib
from typing import Any

_HOMES = {
    "init": "lcm.models",
    "apply": "lcm.models",
    "init_state": "lcm.models",
    "parameter_count": "lcm.models",
    "flops_per_token": "lcm.models",
    "state_bytes_per_token": "lcm.models",
    "train": "lcm.training",
    "load": "lcm.pretrained",
    "generate": "lcm.decoding",
    "stream": "lcm.decoding",
    "beam_search": "lcm.decoding",
}
_MODULES = (
    "config",
    "data",
    "decoding",
    "evaluation",
    "models",
    "positions",
    "pretrained",
    "report",
    "training",
)

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"lcm.{name}")
    raise AttributeError(f"module 'lcm' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
