"""Values of options, as a config writes them behind a name."""

import ast
import math
from typing import Any


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
