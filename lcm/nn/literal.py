"""Options, as a config writes them in one text: `NAME=VALUE,...`."""

import ast
import math
from collections.abc import Mapping
from typing import Any

from lcm.errors import ConfigError


def settings(where: str, text: str, defaults: Mapping[str, Any], of: str) -> dict[str, Any]:
    """The values that a text gives, by name, each of the type of its default.

    where: the key of the config that has the text; of: what has these options, for the message.

    Raises:
        ConfigError: for a name that there is not or that comes twice, or a value of another type.
    """
    values: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.strip().partition("=")
        if name not in defaults:
            has = ", ".join(defaults) or "none"
            raise ConfigError(f"{where}={text!r}: {name!r} is unknown, {of} has {has}")
        if name in values:
            raise ConfigError(f"{where}={text!r} gives {name} twice: leave one of them out")
        values[name] = literal(value, defaults[name])
        if values[name] is None:
            raise ConfigError(
                f"{where}={text!r}: {name} is a {type(defaults[name]).__name__}, write it as "
                f"{name}={defaults[name]}"
            )
    return values


def literal(text: str, default: Any) -> Any:
    """The value that a text stands for, of the type of a default, and None where it is none of that
    type: an integer serves as a float, but 2.7 is no integer and 2 no bool, and nothing that is
    infinite is a number."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text.strip())
        if type(default) is float and type(value) is int:
            value = float(value)
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError):
        return None
    fits = type(value) is type(default) and math.isfinite(value)
    return value if fits else None
