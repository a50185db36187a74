"""Encodings by name: the table, and the way between a dataclass and a config entry."""

import dataclasses
from typing import Any

from lcm.errors import ConfigError
from lcm.positions.absolute import Countdown, Learned, NoPE, Sinusoidal
from lcm.positions.alibi import ALiBi
from lcm.positions.base import PositionEncoding
from lcm.positions.chain import Chain
from lcm.positions.rope import RoPE

ENCODINGS: dict[str, type[PositionEncoding]] = {
    "nope": NoPE,
    "rope": RoPE,
    "alibi": ALiBi,
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "countdown": Countdown,
    "chain": Chain,
}


def config(encoding: PositionEncoding | str, **fields: Any) -> dict[str, Any]:
    """The config entry of an encoding: `name` and its fields, nested for a chain.

    Takes a value, `config(RoPE(base=5e5))`, or a name with fields, `config("rope", base=5e5)`.
    `"countdown+rope"` names a chain.

    Raises:
        ConfigError: for an unknown name or field.
    """
    if isinstance(encoding, str):
        return config(_named(encoding, fields))
    names = {kind: name for name, kind in ENCODINGS.items()}
    if type(encoding) not in names:
        raise ConfigError(
            f"{type(encoding).__name__} is not in lcm.positions.ENCODINGS: add it there by a name"
        )
    values = {f.name: getattr(encoding, f.name) for f in dataclasses.fields(encoding)}
    nested = {k: config(v) if isinstance(v, PositionEncoding) else v for k, v in values.items()}
    return {"name": names[type(encoding)], **nested}


def make(entry: Any) -> PositionEncoding:
    """The encoding of a config entry: a dict or ConfigDict of `name` and fields.

    Raises:
        ConfigError: for an unknown name or field.
    """
    fields = {k: v for k, v in entry.items() if k != "name"}
    nested = {k: make(v) if hasattr(v, "items") else v for k, v in fields.items()}
    return _named(entry["name"], nested)


def _named(name: str, fields: dict[str, Any]) -> PositionEncoding:
    if "+" in name:
        first, _, second = name.partition("+")
        return Chain(_named(first, {}), _named(second, fields))
    if name not in ENCODINGS:
        raise ConfigError(
            f"model.positions={name!r} is unknown: choose from {', '.join(ENCODINGS)}, "
            "or two joined by +, such as countdown+rope"
        )
    kind = ENCODINGS[name]
    known = [f.name for f in dataclasses.fields(kind)]
    for field in fields:
        if field not in known:
            raise ConfigError(
                f"model.positions.{field} is not a field of {name}: "
                f"it has {', '.join(known) or 'none'}"
            )
    if kind is Chain and set(fields) != set(known):
        raise ConfigError("model.positions=chain needs first and second: write countdown+rope")
    return kind(**fields)
