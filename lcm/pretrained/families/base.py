"""What a family of models is: its config in both directions, and one list of its weights."""

import numbers
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from lcm import positions
from lcm.errors import ConfigError
from lcm.models import ModelSpec
from lcm.nn import LayerSpec
from lcm.positions import Layers, PositionEncoding, RoPE
from lcm.pretrained.source import Source

Config = dict[str, Any]
SLIDING, FULL = "sliding_attention", "full_attention"


class Form(NamedTuple):
    """How a tensor of theirs holds one of ours, or several.

    split: `(tensor, sizes, layer) -> ours`, views where it can be, where sizes are the last axes
        of ours.
    join: `(ours, layer) -> tensor`, its inverse.
    """

    split: Callable[[np.ndarray, Sequence[int], LayerSpec], Sequence[np.ndarray]]
    join: Callable[[Sequence[np.ndarray], LayerSpec], np.ndarray]


def _split_rows(tensor: np.ndarray, sizes: Sequence[int], layer: LayerSpec) -> list[np.ndarray]:
    return [rows.T for rows in np.split(tensor, np.cumsum(sizes)[:-1])]


def _split_among(tensor: np.ndarray, sizes: Sequence[int], count: int) -> Sequence[np.ndarray]:
    rest = tensor.shape[1:]
    by_head = tensor.reshape(count, -1, *rest)
    ends = np.cumsum([size // count for size in sizes])[:-1]
    return [part.reshape(-1, *rest).T for part in np.split(by_head, ends, axis=1)]


def _join_among(ours: Sequence[np.ndarray], count: int) -> np.ndarray:
    rows = [leaf.T for leaf in ours]
    rest = rows[0].shape[1:]
    by_head = [r.reshape(count, -1, *rest) for r in rows]
    return np.concatenate(by_head, axis=1).reshape(-1, *rest)


SAME = Form(lambda tensor, *_: [tensor], lambda ours, *_: ours[0])
# torch's Linear is [out, in]; a bias is its own transpose.
LINEAR = Form(lambda tensor, *_: [tensor.T], lambda ours, *_: ours[0].T)
# Gemma multiplies by 1 + weight; both are float32.
ONE_LESS = Form(lambda tensor, *_: [tensor + 1], lambda ours, *_: ours[0] - 1)
# Rows of one below those of the other: Phi-3, MPT.
FUSED = Form(_split_rows, lambda ours, *_: np.concatenate([leaf.T for leaf in ours]))
# For each head its rows of q, of k and of v: GPT-NeoX, BLOOM.
BY_HEAD = Form(
    lambda tensor, sizes, layer: _split_among(tensor, sizes, layer.heads),
    lambda ours, layer: _join_among(ours, layer.heads),
)
# For each head of keys its rows of all parts, of which some are of several heads of values.
BY_KEY_HEAD = Form(
    lambda tensor, sizes, layer: _split_among(tensor, sizes, layer.kv_heads),
    lambda ours, layer: _join_among(ours, layer.kv_heads),
)


class Weight(NamedTuple):
    """A tensor of theirs and what it is of ours.

    name: with `{n}` for the number of the layer, `{pair}` where two of ours are one of theirs, or
        what else `Family.places` has; `{e}` for the number of an expert.
    paths: of ours, below a layer where the name has a number; several where the form joins them.
    mixer: of the layers that it is for, where others have another tensor for the same path;
        `blocks` of what layers share, whose paths lie below a block.
    """

    name: str
    paths: tuple[str, ...]
    form: Form
    mixer: str = ""


def weights(*rows: tuple[str, str, Form]) -> tuple[Weight, ...]:
    """A list of weights from rows of name, paths joined by spaces, form.

    A row of a matrix stands for its bias too, and a row of a norm for that of its bias:
    `NAME.weight` and `NAME.bias`, `PATH` and `PATH_bias`, `NORM/scale` and `NORM/bias`.
    """
    made = []
    for name, paths, form in rows:
        made.append(Weight(name, tuple(paths.split()), form))
        if "table" not in paths and "kernel" not in paths:
            biases = tuple(_bias(path) for path in paths.split())
            made.append(Weight(name.removesuffix("weight") + "bias", biases, form))
    return tuple(made)


def _bias(path: str) -> str:
    return path.replace("/scale", "/bias") if path.endswith("/scale") else f"{path}_bias"


HALVES = "gate", "up", "down"  # of a gated MLP


def experts(stem: str) -> tuple[Weight, ...]:
    """The matrices of each expert below a stem."""
    return tuple(
        Weight(f"{stem}.experts.{{e}}.{name}_proj.weight", (f"mlp/expert_{name}",), LINEAR)
        for name in HALVES
    )


def in_order(spec: ModelSpec) -> list[Config]:
    """What names of tensors have for each layer of ours where layers of theirs are one or two."""
    return [{"n": n, "pair": n // 2} for n in range(spec.depth)]


def by_mixer(
    spec: ModelSpec, names: Sequence[str], others: Sequence[str] = ()
) -> dict[str, LayerSpec]:
    """A layer of each mixer, of a model that is to have all of these, may have others, and no more.

    Raises:
        ConfigError: for a mixer that is neither, or one that is missing.
    """
    found = {layer.mixer: layer for layer in spec.layers}
    if not set(names) <= found.keys() <= {*names, *others}:
        known = ", ".join([*names, *(f"perhaps {name}" for name in others)])
        raise ConfigError(f"layers are {', '.join(found)}, it has {known}")
    return found


def check_mixer(spec: ModelSpec, mixer: str, name: str) -> None:
    """Refuses a model that is not of one mixer alone, as those of a name are."""
    others = [layer.mixer for layer in spec.layers if layer.mixer != mixer]
    if others:
        raise ConfigError(f"layers are {others[0]}, those of {name} are all {mixer}")


def layer_names(
    hf: Config, names: Sequence[str], known: Collection[str], key: str = "layer_types"
) -> list[str]:
    """The names that a key of a config has for layers, one after the other.

    known: all that the family has.

    Raises:
        ConfigError: for an unknown one, or if there are more or fewer than layers.
    """
    depth = need(hf, "num_hidden_layers")
    if len(names) != depth:
        raise ConfigError(
            f"{key} has {len(names)} names for num_hidden_layers={depth}: take the config of this "
            "checkpoint"
        )
    if unknown := sorted(set(names) - set(known)):
        raise ConfigError(
            f"{key} names {unknown[0]}, which is none of {', '.join(known)}: take a checkpoint "
            "that has these alone"
        )
    return list(names)


class Family(NamedTuple):
    """Models that share names of tensors and keys of a config.

    types: `model_type` of configs it reads; the class that transformers has for each.
    read: the config's content, defaults filled in, as changes of `cfg.model`.
    write: the inverse; what it cannot say shows when its result is read again.
    defaults: what the class of transformers takes where a config is silent.
    weights: all tensors, in both directions.
    renamed: patterns of names that other tools or versions write, and what stands for them here.
    harmless: patterns of tensors that a file may have and the model needs not.
    unused: patterns of tensors that files need not have, of parameters without an effect.
    has: keys of FOREIGN that it has.
    places: what each layer of ours has for the braces of names; a block has its first use's.
    view: a source as it should be where tools lay tensors out in ways that `renamed` cannot say.
    """

    types: dict[str, str]
    read: Callable[[Config], dict[str, Any]]
    write: Callable[[ModelSpec, int], Config]
    defaults: Config
    weights: tuple[Weight, ...]
    renamed: tuple[tuple[str, str], ...] = ()
    harmless: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    places: Callable[[ModelSpec], list[Config]] = in_order
    view: Callable[[Source], Source] = lambda source: source

    def plain(self, hf: Config) -> Config:
        """The keys of the language model, with defaults where the config is silent."""
        own = hf.get("text_config") or hf
        return {**self.defaults, **own}

    def renamed_tensor(self, name: str) -> str:
        """The name that `weights` has for a tensor."""
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return name


# Keys that ask for what the decoder does not have.
FOREIGN = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "attention_sinks",
    "kv_lora_rank",
    "quantization_config",
    "use_bidirectional_attention",
    "is_encoder_decoder",
)


# Numbers of something, of which a config that has the key has one or more.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_heads",
    "state_size",
    "vocab_size",
)


def check_sizes(hf: Config) -> None:
    """Refuses sizes that are no whole number from 1 on; null is as if the key were not there.

    Raises:
        ConfigError: naming the key and its value.
    """
    for key in SIZES:
        value = hf.get(key)
        number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if value is not None and not (number and value >= 1):
            raise ConfigError(f"{key}={value!r} must be a whole number, 1 or more")


def check_foreign(hf: Config, has: tuple[str, ...] = ()) -> None:
    """Refuses keys that ask for what the decoder does not have, but for those that a family has.

    Raises:
        ConfigError: naming the key and its value.
    """
    for key in FOREIGN:
        if hf.get(key) and key not in has:
            shown = "..." if isinstance(hf[key], dict) else hf[key]
            raise ConfigError(
                f"{key}={shown} asks for what the decoder does not have: take a checkpoint "
                "without it"
            )


def need(hf: Config, key: str, *allowed: Any) -> Any:
    """A value that must be there and, if any are given, one of those.

    Raises:
        ConfigError: naming key and values.
    """
    if hf.get(key) is None and None not in allowed:
        raise ConfigError(f"{key} is missing from the config of the model: fetch config.json again")
    if allowed and hf.get(key) not in allowed:
        raise ConfigError(
            f"{key}={hf[key]!r} is not what the decoder has: it has {', '.join(map(str, allowed))}"
        )
    return hf.get(key)


def choose(hf: Config, key: str, choices: dict[Any, Any]) -> Any:
    """What a value of theirs is here."""
    return choices[need(hf, key, *choices)]


def key_of(choices: dict[Any, Any], value: Any) -> Any:
    """The first key of a value; the first of all where none has it, which reading again shows."""
    return next((key for key, found in choices.items() if found == value), next(iter(choices)))


def sizes(hf: Config) -> dict[str, Any]:
    """Sizes as most configs call them."""
    width, heads = need(hf, "hidden_size"), need(hf, "num_attention_heads")
    return {
        "width": width,
        "depth": need(hf, "num_hidden_layers"),
        "hidden": need(hf, "intermediate_size"),
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_size": hf.get("head_dim") or width // heads,
        "vocab": need(hf, "vocab_size"),
        "tied": bool(need(hf, "tie_word_embeddings")),
    }


def sizes_to_hf(spec: ModelSpec, length: int) -> Config:
    """The inverse of `sizes`, and the length."""
    layer = spec.layers[0]
    return {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "intermediate_size": layer.hidden,
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "head_dim": layer.head_size,
        "vocab_size": spec.vocab,
        "tie_word_embeddings": spec.tied,
        "max_position_embeddings": length,
    }


def rotations(hf: Config, *, partial: bool = False, by_kind: bool = False) -> dict[str, RoPE]:
    """The RoPE of layers that slide and of those that see all.

    partial: whether the family can rotate a part of a head.
    by_kind: whether it can have two of them.

    Raises:
        ConfigError: for positions that its class of transformers does not have.
    """
    found = positions.from_hf(hf)
    own = found.kinds if isinstance(found, Layers) else {SLIDING: found, FULL: found}
    if own.keys() != {SLIDING, FULL} or not (by_kind or own[SLIDING] == own[FULL]):
        raise ConfigError(f"positions differ by layer ({', '.join(own)}), which it does not have")
    for encoding in own.values():
        if not isinstance(encoding, RoPE) or encoding.interleaved:
            raise ConfigError(f"positions are {encoding}, it has RoPE in halves of a head")
        if encoding.fraction != 1 and not partial:
            raise ConfigError(
                f"partial_rotary_factor={encoding.fraction} rotates a part of a head, it has 1.0"
            )
    return own


def layered(own: dict[str, RoPE], names: Sequence[str], window: int) -> dict[str, Any]:
    """Positions and windows of layers that slide or see all, by their names in order.

    The encoding of the model is that of the layers that see all: to extend it leaves the others
    as they are.
    """
    used = dict.fromkeys(names)
    main = own[FULL if FULL in used else SLIDING]
    changes = {"positions": positions.config(main), "window": 0}
    if len(used) == 1:
        return {**changes, "window": window if SLIDING in used else 0}
    kinds: dict[str, dict[str, Any]] = {name: {} for name in used}
    kinds[SLIDING]["window"] = window
    if own[SLIDING] != main:
        kinds[SLIDING]["positions"] = positions.config(own[SLIDING])
    return {**changes, "pattern": period(names), "kinds": kinds}


def period(names: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that names of layers repeat."""
    names = tuple(names)
    return names[: next(p for p in range(1, len(names) + 1) if names[p:] == names[:-p])]


def layers_to_hf(spec: ModelSpec) -> tuple[list[str], int, Config]:
    """The names of the layers, the window of those that slide, and the keys of their positions."""
    layers = spec.in_order
    names = [SLIDING if layer.window else FULL for layer in layers]
    own: dict[str, PositionEncoding] = {
        name: layer.positions for name, layer in zip(names, layers, strict=True)
    }
    first, *others = own.values()
    one = all(other == first for other in others)
    hf = positions.to_hf(first if one else Layers(own, tuple(names)), spec.depth)
    return names, max(layer.window for layer in layers), hf


ATTENTION_AND_MLP = {
    (False, False): "none",
    (True, False): "attention",
    (False, True): "mlp",
    (True, True): "all",
}
