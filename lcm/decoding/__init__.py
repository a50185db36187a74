"""Decoding: from prompts to text.

    generate, stream, beam_search    what most callers want
    Engine, Session                  rows of requests that come and go; a conversation
    processors, history, sampling    between logits and a token, as pure functions
    text                             from tokens to text

Imported when first used: settings of sampling can be read without jax.
"""

import importlib
from typing import Any

_HOMES = {
    "generate": "texts",
    "stream": "texts",
    "Generation": "texts",
    "conversation": "texts",
    "beam_search": "beam",
    "fitted": "context",
    "Engine": "engine",
    "Session": "session",
    "Event": "requests",
    "Request": "requests",
    "Sampling": "settings",
    "Plan": "settings",
    "plan": "settings",
    "History": "history",
    "begin": "history",
    "insert": "history",
    "observe": "history",
    "take": "history",
    "Chain": "processors",
    "chain": "processors",
    "process": "processors",
    "Drawn": "sampling",
    "draw": "sampling",
    "keys": "sampling",
    "sample": "sampling",
    "TextStream": "text",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lcm.decoding.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
