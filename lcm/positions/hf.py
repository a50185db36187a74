"""Encodings from and to the `config.json` of Hugging Face checkpoints.

Read are `rope_parameters` of transformers 5, whole or nested by type of layer, and what came before
it; layers without rotation; ALiBi, T5's buckets and learned tables. Windows of attention are no
encoding: `model.kinds.KIND.window` holds them. DeepSeek's attention multiplies its scores once more
by `mscale_all_dim`, which is no part of the rotation and not read.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lcm.errors import ConfigError
from lcm.positions.absolute import Learned, NoPE
from lcm.positions.alibi import ALiBi
from lcm.positions.base import PositionEncoding
from lcm.positions.bias import T5
from lcm.positions.chain import Chain
from lcm.positions.hf_models import ALIASES, DEFAULTS, INTERLEAVED, ROTATED_IN_WINDOWS
from lcm.positions.registry import config as entry
from lcm.positions.rope import RoPE
from lcm.positions.scaling import DynamicNTK, Linear, Llama3, LongRoPE, Proportional, YaRN
from lcm.positions.temperature import Chunked, FloorScale

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Layers:
    """Encodings by kind of layer, and the kinds in the order of the layers, repeated over them."""

    kinds: dict[str, PositionEncoding]
    pattern: tuple[str, ...]

    def model(self) -> dict[str, Any]:
        """The keys of a config: `cfg.model.update(layers.model())`."""
        kinds = {name: {"positions": entry(encoding)} for name, encoding in self.kinds.items()}
        return {"pattern": self.pattern, "kinds": kinds}


# Fields of a class by their keys; those of every RoPE are base and fraction, see `_keys`.
_OPTIONS = {"factor": "factor", "original_max_position_embeddings": "original"}
_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_LISTS = {"short_factor": "short", "long_factor": "long", "attention_factor": "attention_factor"}
_BANDS = {"low_freq_factor": "alpha", "high_freq_factor": "beta"}
ROPES: dict[str, tuple[type[RoPE], dict[str, str]]] = {
    "default": (RoPE, {}),
    "linear": (Linear, {"factor": "factor"}),
    "dynamic": (DynamicNTK, {"factor": "factor"}),
    "yarn": (YaRN, {**_OPTIONS, **{key: key for key in _YARN}}),
    "longrope": (LongRoPE, {**_OPTIONS, **_LISTS}),
    "llama3": (Llama3, {**_OPTIONS, **_BANDS}),
    "proportional": (Proportional, {"factor": "factor"}),
}
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", *_BANDS),
}
# Older names of types. Three positions to a token (mrope) are the same one for text.
_FORMER = {"su": "longrope", "mrope": "default"}
# Keys of rope_parameters that leave frequencies as they are.
_IDLE = {"rope_type", "type", "finetuned", "mrope_section", "mrope_interleaved"}


def from_hf(config: Config) -> PositionEncoding | Layers:
    """The encoding of a checkpoint's `config.json`, or `Layers` where they differ.

    Raises:
        ConfigError: for rope types and position embeddings that are not known, keys that are
            missing, and configs that say nothing of positions.
    """
    hf = _plain(config)
    kind = hf.get("position_embedding_type")
    if hf.get("alibi") or kind == "alibi":
        if hf.get("alibi_bias_max", 8) != 8:
            raise ConfigError(
                f"alibi_bias_max={hf['alibi_bias_max']} is not ALiBi of slopes 2^(-8h/H): only 8 is"
            )
        return ALiBi()
    if "relative_attention_num_buckets" in hf:
        farthest = hf.get("relative_attention_max_distance", 128)
        return T5(buckets=hf["relative_attention_num_buckets"], farthest=farthest)
    if kind in ("absolute", "learned", "learned_absolute"):
        return Learned(_need(hf, "max_position_embeddings"), std=hf.get("initializer_range", 0.02))
    if kind in ("nope", "none"):
        return NoPE()
    if kind not in (None, "rope", "rotary"):
        raise ConfigError(
            f"position_embedding_type={kind!r} is unknown: known are absolute, learned, "
            "learned_absolute, alibi, rope, rotary, nope, none"
        )
    return _rotary(hf)


def to_hf(positions: PositionEncoding | Layers, depth: int = 0) -> dict[str, Any]:
    """The keys of a `config.json` that `from_hf` reads as this.

    depth: layers of the model; 0 writes one round of the pattern.

    Raises:
        ConfigError: for an encoding, or a value of one of its fields, that has no such form.
    """
    if isinstance(positions, Layers):
        length = depth or len(positions.pattern)
        names = [positions.pattern[n % len(positions.pattern)] for n in range(length)]
        hf, expected = _layers_to_hf(positions.kinds, names), _layers(positions.kinds, names)
    else:
        hf, expected = _one_to_hf(positions, depth or 1), positions
    if from_hf(hf) != expected:
        raise ConfigError(
            "layers differ in what a Hugging Face config has once, such as interleaved or the "
            f"trained length of dynamic NTK: {positions}"
        )
    return hf


def _plain(config: Config) -> dict[str, Any]:
    """The keys that are set, by their newest names, with the defaults of the model below them."""
    config = config.get("text_config") or config
    attention = config.get("attn_config") or {}
    given = {
        **config,
        **{key: attention[key] for key in ("alibi", "alibi_bias_max") if key in attention},
    }
    given = {ALIASES.get(key, key): value for key, value in given.items()}
    silent = {**DEFAULTS.get(given.get("model_type", ""), {})}
    if "attention_chunk_size" in given:  # null turns it off; elsewhere it asks for the default
        silent.pop("attention_chunk_size", None)
    return {**silent, **{key: value for key, value in given.items() if value is not None}}


def _need(hf: Config, key: str, what: str = "this encoding") -> Any:
    if hf.get(key) is None:
        raise ConfigError(f"{key} is missing from the Hugging Face config: {what} needs it")
    return hf[key]


def _rotary(hf: dict[str, Any]) -> PositionEncoding | Layers:
    """One RoPE, one for each type of layer, or layers with and without."""
    given = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not given and not {"rope_theta", "no_rope_layers", "rotary_dim"} & hf.keys():
        raise ConfigError(
            "the Hugging Face config says nothing of positions: it needs rope_parameters, "
            "rope_theta, alibi, relative_attention_num_buckets, position_embedding_type, or a "
            f"model_type of {', '.join(DEFAULTS)}"
        )
    if "rope_local_base_freq" in hf and not _nested(given):  # Gemma 3 before transformers 5
        given = {
            "full_attention": {"rope_theta": 1_000_000.0, **_theta(hf), **given},
            "sliding_attention": {"rope_theta": hf["rope_local_base_freq"]},
        }
    if _nested(given):
        kinds = {
            name: NoPE() if own is None else _rope(own, hf)
            for name, own in given.items()
            if own is None or isinstance(own, Mapping)
        }
        return _layers(kinds, _layer_types(hf, kinds))
    rope = _rope(given, hf)
    if hf.get("model_type") in ROTATED_IN_WINDOWS and hf.get("sliding_window"):
        kinds = {"sliding_attention": rope, "full_attention": NoPE()}
        return _layers(kinds, _layer_types(hf, kinds))
    rotated = _rotated_layers(hf)
    if not rotated:
        return rope
    nope: PositionEncoding = NoPE()
    if "attention_chunk_size" in hf:
        rope = Chain(Chunked(hf["attention_chunk_size"]), rope)
    if hf.get("attn_temperature_tuning"):
        nope = Chain(FloorScale(hf.get("attn_scale", 0.1), hf.get("floor_scale", 8192)), nope)
    return _layers({"rope": rope, "nope": nope}, ["rope" if one else "nope" for one in rotated])


def _nested(given: Config) -> bool:
    return any(isinstance(value, Mapping) for value in given.values())


def _theta(hf: Config) -> dict[str, Any]:
    return {"rope_theta": hf["rope_theta"]} if "rope_theta" in hf else {}


def _rotated_layers(hf: Config) -> list[int]:
    """1 for each layer that rotates, 0 for the others; empty if all do."""
    if hf.get("no_rope_layers"):
        return list(hf["no_rope_layers"])[: hf.get("num_hidden_layers")]
    interval = hf.get("no_rope_layer_interval")
    if not interval:
        return []
    depth = _need(hf, "num_hidden_layers", f"no_rope_layer_interval={interval}")
    return [int((layer + 1) % interval != 0) for layer in range(depth)]


def _layer_types(hf: Config, kinds: Config) -> list[str]:
    if "layer_types" in hf:
        names = list(hf["layer_types"])
    else:
        every = _need(hf, "sliding_window_pattern", "a config of several types of layers")
        depth = _need(hf, "num_hidden_layers", f"sliding_window_pattern={every}")
        names = [
            "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
            for layer in range(depth)
        ]
    if missing := sorted(set(names) - kinds.keys()):
        raise ConfigError(
            f"layer_types names {', '.join(missing)}, for which rope_parameters has no entry: it "
            f"has {', '.join(kinds)}"
        )
    return names


def _layers(kinds: dict[str, PositionEncoding], names: Sequence[str]) -> PositionEncoding | Layers:
    """One encoding if all layers have the same, else the shortest pattern that gives the names."""
    used = {name: kinds[name] for name in dict.fromkeys(names)}
    first, *others = used.values()
    if all(other == first for other in others):
        return first
    names = tuple(names)
    period = next(p for p in range(1, len(names) + 1) if names[p:] == names[:-p])
    return Layers(used, names[:period])


def _rope(given: Config, hf: Config) -> RoPE:
    """The RoPE of a dict of rope parameters, with what stands beside it in the config."""
    given = {key: value for key, value in given.items() if value is not None}
    name = given.get("rope_type", given.get("type", "default"))
    name = _FORMER.get(name, name)
    if name == "yarn" and "short_factor" in given:  # Phi-3's first configs
        name = "longrope"
    if name not in ROPES:
        raise ConfigError(f"rope_type={name!r} is unknown: known are {', '.join(ROPES)}")
    kind, fields = ROPES[name]
    fields = {**_shared(name), **fields}
    if unknown := sorted(given.keys() - fields.keys() - _IDLE - _original(name)):
        raise ConfigError(
            f"rope_type={name} has no {', '.join(unknown)}: it has {', '.join(fields)}"
        )
    for key in _REQUIRED.get(name, ()):
        _need(given, key, f"rope_type={name}")
    given = {**_beside(name, given, hf), **given}
    values = {field: given[key] for key, field in fields.items() if key in given}
    if name == "dynamic":
        values["original"] = _need(hf, "max_position_embeddings", "rope_type=dynamic")
    elif "original_max_position_embeddings" in fields:
        values.update(_lengths(name, given, hf))
    return kind(interleaved=_interleaved(hf), **_typed(kind, values))


def _shared(name: str) -> dict[str, str]:
    """Fields of every RoPE; p-RoPE takes the share of pairs that turn for that of a head."""
    share = "p" if name == "proportional" else "fraction"
    return {"rope_theta": "base", "partial_rotary_factor": share}


def _original(name: str) -> set[str]:
    """Lengths that other types than those with a field of it carry along unread."""
    return (
        {"original_max_position_embeddings"} if name in ("default", "linear", "dynamic") else set()
    )


def _beside(name: str, given: Config, hf: Config) -> dict[str, Any]:
    """Base and share of a head that stand in the config, not in its rope parameters."""
    beside = {key: hf[key] for key in ("rope_theta", "partial_rotary_factor") if key in hf}
    if "rotary_dim" in hf and "partial_rotary_factor" not in {**beside, **given}:
        size = hf.get("head_dim") or _need(hf, "hidden_size") // _need(hf, "num_attention_heads")
        beside["partial_rotary_factor"] = hf["rotary_dim"] / size
    return beside


def _lengths(name: str, given: Config, hf: Config) -> dict[str, Any]:
    """The trained length and the factor of extension, which may be a ratio of lengths."""
    key = "original_max_position_embeddings"
    original = hf.get(key) or given.get(key) or _need(hf, "max_position_embeddings", name)
    if "factor" in given:
        return {"original": original}
    longest = _need(hf, "max_position_embeddings", f"rope_type={name} without a factor")
    return {"original": original, "factor": longest / original}


def _typed(kind: type[RoPE], values: dict[str, Any]) -> dict[str, Any]:
    """Lists as tuples and numbers as the fields of the class have them."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    as_type = {tuple: lambda x: tuple(map(float, x))}
    return {
        name: as_type.get(type(defaults[name]), type(defaults[name]))(value)
        for name, value in values.items()
    }


def _interleaved(hf: Config) -> bool:
    return bool(hf.get("rope_interleave", hf.get("model_type") in INTERLEAVED))


def _layers_to_hf(kinds: Mapping[str, PositionEncoding], names: Sequence[str]) -> dict[str, Any]:
    """`no_rope_layers` for kinds of the names rope and nope, else rope parameters by type."""
    hf: dict[str, Any] = {"num_hidden_layers": len(names)}
    if kinds.keys() <= {"rope", "nope"}:
        hf["no_rope_layers"] = [int(name == "rope") for name in names]
        for encoding in kinds.values():
            hf.update(_kind_to_hf(encoding))
        return hf
    hf.update(layer_types=list(names), rope_parameters={})
    for name, encoding in kinds.items():
        own = {"rope_parameters": None} if encoding == NoPE() else _rope_to_hf(encoding)
        hf["rope_parameters"][name] = own.pop("rope_parameters")
        hf.update(own)
    return hf


def _kind_to_hf(encoding: PositionEncoding) -> dict[str, Any]:
    """Of layers with and without rotation, Llama 4's among them."""
    match encoding:
        case NoPE():
            return {}
        case Chain(first=FloorScale(a=a, floor=floor), second=NoPE()):
            return {"attn_temperature_tuning": True, "attn_scale": a, "floor_scale": floor}
        case Chain(first=Chunked(size=size), second=rope):
            return {"attention_chunk_size": size, **_rope_to_hf(rope)}
    return _rope_to_hf(encoding)


def _one_to_hf(encoding: PositionEncoding, depth: int) -> dict[str, Any]:
    """Of an encoding that all layers have."""
    match encoding:
        case NoPE() | Chain(first=FloorScale()):
            return _layers_to_hf({"nope": encoding}, ["nope"] * depth)
        case Chain(first=Chunked()):
            return _layers_to_hf({"rope": encoding}, ["rope"] * depth)
        case ALiBi():
            return {"alibi": True}
        case T5():
            _check_fields(encoding, {"buckets", "farthest"})
            return {
                "relative_attention_num_buckets": encoding.buckets,
                "relative_attention_max_distance": encoding.farthest,
            }
        case Learned():
            _check_fields(encoding, {"length", "std"})
            return {
                "position_embedding_type": "absolute",
                "max_position_embeddings": _set(encoding, "length"),
                "initializer_range": encoding.std,
            }
    return _rope_to_hf(encoding)


def _rope_to_hf(rope: PositionEncoding) -> dict[str, Any]:
    """`rope_parameters` and what stands beside them."""
    names = [name for name, (kind, _) in ROPES.items() if kind is type(rope)]
    if not names:
        known = ", ".join(kind.__name__ for kind, _ in ROPES.values())
        raise ConfigError(
            f"{type(rope).__name__} has no Hugging Face form: those that have are NoPE, ALiBi, T5, "
            f"Learned, {known}, and Llama 4's chains chunked+rope and floor_scale+nope"
        )
    name = names[0]
    fields = {**_shared(name), **ROPES[name][1]}
    beside = {"rope_interleave": True} if rope.interleaved else {}
    if name == "dynamic":
        beside["max_position_embeddings"] = _set(rope, "original")
    _check_fields(rope, {*fields.values(), "interleaved", *(["original"] * (name == "dynamic"))})
    needed = {"rope_theta", "factor", "original_max_position_embeddings", *_REQUIRED.get(name, ())}
    parameters: dict[str, Any] = {"rope_type": name}
    for key, field in fields.items():
        value = _set(rope, field) if field == "original" else getattr(rope, field)
        if key in needed or value != _default(type(rope), field):
            parameters[key] = list(value) if isinstance(value, tuple) else value
    return {"rope_parameters": parameters, **beside}


def _default(kind: type[PositionEncoding], name: str) -> Any:
    return next(field.default for field in dataclasses.fields(kind) if field.name == name)


def _set(encoding: PositionEncoding, name: str) -> int:
    """A length, which must not be left to a model."""
    if not getattr(encoding, name):
        raise ConfigError(
            f"{type(encoding).__name__}({name}=0) takes its length from a model, which a Hugging "
            f"Face config cannot: set {name} to it"
        )
    return getattr(encoding, name)


def _check_fields(encoding: PositionEncoding, known: set[str]) -> None:
    for field in dataclasses.fields(encoding):
        value = getattr(encoding, field.name)
        if field.name not in known and value != field.default:
            raise ConfigError(
                f"{type(encoding).__name__}({field.name}={value!r}) has no Hugging Face form: "
                f"leave {field.name} at {field.default!r}"
            )
