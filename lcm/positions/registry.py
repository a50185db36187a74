"""Encodings and placements by name: the tables, and the way between a value and a config entry."""

import dataclasses
from typing import Any

from lcm.errors import ConfigError
from lcm.positions.absolute import Countdown, Infused, Learned, NoPE, Sinusoidal
from lcm.positions.alibi import ALiBi
from lcm.positions.base import PositionEncoding
from lcm.positions.bias import (
    T5,
    Fire,
    HardALiBi,
    Kerple,
    KerplePower,
    Sandwich,
    TypeOne,
    TypeTwo,
)
from lcm.positions.chain import Chain
from lcm.positions.clex import CLEX
from lcm.positions.cope import CoPE
from lcm.positions.intervals import Intervals
from lcm.positions.placement import PLACEMENTS, Placement
from lcm.positions.reattention import ReAttention
from lcm.positions.remap import (
    DualChunk,
    LeakyReRoPE,
    LMInfinite,
    LMInfiniteALiBi,
    ReRoPE,
    SelfExtend,
    StreamingLLM,
)
from lcm.positions.rope import RoPE
from lcm.positions.scaling import (
    NTK,
    ByParts,
    DynamicNTK,
    DynamicYaRN,
    Linear,
    Llama3,
    LongRoPE,
    PowerBasis,
    Proportional,
    TruncatedBasis,
    YaRN,
)
from lcm.positions.temperature import (
    Aligned,
    Chunked,
    FloorScale,
    HeadScale,
    LengthScale,
    LogLength,
    LogN,
    UniformScale,
)
from lcm.positions.xpos import XPos

ENCODINGS: dict[str, type[PositionEncoding]] = {
    "nope": NoPE,
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "infused": Infused,
    "countdown": Countdown,
    "intervals": Intervals,
    "rope": RoPE,
    "proportional": Proportional,
    "xpos": XPos,
    "linear": Linear,
    "ntk": NTK,
    "dynamic_ntk": DynamicNTK,
    "by_parts": ByParts,
    "yarn": YaRN,
    "dynamic_yarn": DynamicYaRN,
    "longrope": LongRoPE,
    "llama3": Llama3,
    "power": PowerBasis,
    "truncated": TruncatedBasis,
    "clex": CLEX,
    "rerope": ReRoPE,
    "leaky_rerope": LeakyReRoPE,
    "self_extend": SelfExtend,
    "dual_chunk": DualChunk,
    "lm_infinite": LMInfinite,
    "lm_infinite_alibi": LMInfiniteALiBi,
    "streaming_llm": StreamingLLM,
    "reattention": ReAttention,
    "alibi": ALiBi,
    "hard_alibi": HardALiBi,
    "t5": T5,
    "kerple": Kerple,
    "kerple_power": KerplePower,
    "sandwich": Sandwich,
    "type_one": TypeOne,
    "type_two": TypeTwo,
    "fire": Fire,
    "cope": CoPE,
    "log_n": LogN,
    "log_length": LogLength,
    "length_scale": LengthScale,
    "uniform_scale": UniformScale,
    "head_scale": HeadScale,
    "floor_scale": FloorScale,
    "aligned": Aligned,
    "chunked": Chunked,
    "chain": Chain,
}


def config(encoding: PositionEncoding | str, **fields: Any) -> dict[str, Any]:
    """The config entry of an encoding: `name` and its fields, nested where a field is an encoding.

    Takes a value, `config(RoPE(base=5e5))`, or a name with fields, `config("rope", base=5e5)`.
    `"countdown+rope"` names a chain.

    Raises:
        ConfigError: for an unknown name or field.
    """
    if isinstance(encoding, str):
        return config(_encoding(encoding, fields))
    return _entry(ENCODINGS, encoding)


def make(entry: Any) -> PositionEncoding:
    """The encoding of a config entry: a dict or ConfigDict of `name` and fields.

    Raises:
        ConfigError: for an unknown name or field.
    """
    fields = {k: v for k, v in entry.items() if k != "name"}
    nested = {k: make(v) if hasattr(v, "items") else v for k, v in fields.items()}
    return _encoding(entry["name"], nested)


def placement_config(placement: Placement | str, **fields: Any) -> dict[str, Any]:
    """The config entry of a placement, by value or by name with fields.

    Raises:
        ConfigError: for an unknown name or field.
    """
    if isinstance(placement, str):
        placement = _value("train.placement", PLACEMENTS, placement, fields)
    return _entry(PLACEMENTS, placement)


def make_placement(entry: Any) -> Placement:
    """The placement of a config entry.

    Raises:
        ConfigError: for an unknown name or field.
    """
    fields = {k: v for k, v in entry.items() if k != "name"}
    return _value("train.placement", PLACEMENTS, entry["name"], fields)


def _encoding(name: str, fields: dict[str, Any]) -> PositionEncoding:
    if "+" in name:
        first, _, second = name.partition("+")
        return Chain(_encoding(first, {}), _encoding(second, fields))
    if name == "chain" and set(fields) != {"first", "second"}:
        raise ConfigError("model.positions=chain needs first and second: write countdown+rope")
    return _value("model.positions", ENCODINGS, name, fields)


def _value(key: str, table: dict[str, type], name: str, fields: dict[str, Any]) -> Any:
    if name not in table:
        joined = ", or two joined by +, such as countdown+rope" if table is ENCODINGS else ""
        raise ConfigError(f"{key}={name!r} is unknown: choose from {', '.join(table)}{joined}")
    kind = table[name]
    known = [f.name for f in dataclasses.fields(kind)]
    for field in fields:
        if field not in known:
            raise ConfigError(
                f"{key}.{field} is not a field of {name}: it has {', '.join(known) or 'none'}"
            )
    return kind(**fields)


def _entry(table: dict[str, type], value: Any) -> dict[str, Any]:
    names = {kind: name for name, kind in table.items()}
    if type(value) not in names:
        raise ConfigError(
            f"{type(value).__name__} is not in lcm.positions.registry: add it there by a name"
        )
    values = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    nested = {k: config(v) if isinstance(v, PositionEncoding) else v for k, v in values.items()}
    return {"name": names[type(value)], **nested}
