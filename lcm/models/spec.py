"""From `config.model` to a hashable description; combinations that cannot work are refused."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from lcm import positions
from lcm.errors import ConfigError
from lcm.nn import BIASES, MIXERS, MLPS, NORMS, LayerSpec, interventions
from lcm.nn.experts import check_balance
from lcm.nn.interventions import Extension
from lcm.nn.literal import settings
from lcm.nn.spec import ATTENTION
from lcm.ops import attention
from lcm.positions import PositionEncoding

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
REMAT = ("none", "dots", "full", "offload")
BACKENDS = ("auto", *attention.BACKENDS)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A decoder: the kinds of layers in one round of the pattern, and what surrounds them."""

    layers: tuple[LayerSpec, ...]
    depth: int
    vocab: int
    width: int
    positions: PositionEncoding
    tied: bool
    logit_cap: float
    embed_scale: float
    embed_norm: bool
    norm: str
    norm_eps: float
    dtype: Any
    remat: str
    unroll: int
    logit_divisor: float = 1.0

    @property
    def placed(self) -> LayerSpec:
        """The layer whose sizes the model's encoding has: the first that attends."""
        return next((layer for layer in self.layers if layer.attends), self.layers[0])

    @property
    def in_order(self) -> list[LayerSpec]:
        """The kind of each layer, from the first to the last."""
        return [self.layers[n % len(self.layers)] for n in range(self.depth)]

    @property
    def balance(self) -> float:
        """The coefficient in the loss of how uneven the load of experts is; 0 for none."""
        options = (dict(layer.mlp_options) for layer in self.layers)
        return max(own.get("balance", 0.0) for own in options)

    @property
    def rounds(self) -> int:
        """Full repetitions of the pattern; `depth - rounds * len(layers)` layers follow them."""
        return self.depth // len(self.layers)

    @property
    def rest(self) -> int:
        """Layers after the last full repetition."""
        return self.depth % len(self.layers)

    def count(self, kind: int) -> int:
        """How many layers stand at place `kind` of the pattern."""
        return self.rounds + (kind < self.rest)


def spec(cfg: Any) -> ModelSpec:
    """The description of the model in a config.

    Raises:
        ConfigError: naming the key, its value and the remedy.
    """
    model = cfg.model
    _positive(model, "width", "depth", "heads", "vocab")
    if model.unroll < 0:
        raise ConfigError(f"model.unroll={model.unroll} is negative: 0 chooses by the device")
    _one_of("model.dtype", model.dtype, DTYPES)
    _one_of("model.remat", model.remat, REMAT)
    _one_of("model.mixer", model.mixer, MIXERS)
    _one_of("model.norm", model.norm, NORMS)
    if model.embed_scale <= 0:
        raise ConfigError(
            f"model.embed_scale={model.embed_scale} leaves nothing of the embeddings: "
            "give more than 0; 1 leaves them as they are"
        )
    if model.logit_divisor <= 0:
        raise ConfigError(
            f"model.logit_divisor={model.logit_divisor} must be more than 0: 1 leaves logits as "
            "they are"
        )
    if not model.pattern:
        raise ConfigError("model.pattern is empty: name at least one kind of layer")
    if len(model.pattern) > model.depth:
        raise ConfigError(
            f"model.pattern has {len(model.pattern)} kinds for model.depth={model.depth} layers: "
            "shorten the pattern or deepen the model"
        )
    _one_of("model.context_attention", model.context_attention, attention.METHODS)
    _one_of("mesh.order", cfg.mesh.order, attention.ORDERS)
    if model.extension and not any(map(_extends, _mixers(model))):
        raise ConfigError(
            f"model.extension={model.extension!r} is of recurrences, and model.pattern="
            f"{','.join(model.pattern)} has none: leave it empty, choose model.positions instead"
        )
    over = attention.Spread(model.context_attention, cfg.mesh.order)
    layers = (_layer(model, kind, cfg.data.length) for kind in model.pattern)
    layers = tuple(dataclasses.replace(layer, over=over) for layer in layers)
    if model.mixer not in {"attention", *(layer.mixer for layer in layers)}:
        raise ConfigError(
            f"model.mixer={model.mixer} is of no layer, as model.pattern={','.join(model.pattern)} "
            f"says which there are: set --config.model.pattern={model.mixer}"
        )
    _check_shared(model, layers)
    check_balance(layers)
    encoding = positions.make(model.positions)
    description = ModelSpec(
        layers=layers,
        depth=model.depth,
        vocab=model.vocab,
        width=model.width,
        positions=encoding,
        tied=model.tied,
        logit_cap=model.logit_cap,
        embed_scale=float(model.embed_scale),
        embed_norm=model.embed_norm,
        norm=model.norm,
        norm_eps=model.norm_eps,
        dtype=DTYPES[model.dtype],
        remat=model.remat,
        unroll=model.unroll,
        logit_divisor=float(model.logit_divisor),
    )
    encoding = encoding.resolved(description.placed.dims)
    # Heads of recurrences are turned by no encoding: of those alone only what it embeds matters.
    if description.placed.attends or type(encoding).embed is not PositionEncoding.embed:
        encoding.check(description.placed.dims)
    return dataclasses.replace(description, positions=encoding)


def _mixers(model: Any) -> list[str]:
    return [
        dict(model.kinds.get(kind, {})).get("mixer", kind if kind in MIXERS else model.mixer)
        for kind in model.pattern
    ]


def _layer(model: Any, kind: str, length: int) -> LayerSpec:
    """One kind of layer: the keys of `model`, with those of `model.kinds.<kind>` in their place."""
    overrides = dict(model.kinds.get(kind, {}))
    if kind not in model.kinds and kind not in MIXERS:
        known = ", ".join([*MIXERS, *model.kinds])
        raise ConfigError(
            f"model.pattern names {kind!r}, which is neither a mixer nor a key of model.kinds: "
            f"choose from {known}, or define config.model.kinds.{kind}"
        )
    get = {**dict(model), **({"mixer": kind} if kind in MIXERS else {}), **overrides}.__getitem__
    where = f"model.kinds.{kind}" if overrides else "model"
    for key, value in overrides.items():
        if key not in LAYER_KEYS:
            raise ConfigError(
                f"{where}.{key} is not a key of a layer: use {', '.join(sorted(LAYER_KEYS))}"
            )
        wanted = type(model[key])
        if key != "positions" and type(value) not in (wanted, int if wanted is float else wanted):
            raise ConfigError(
                f"{where}.{key}={value!r} is of type {type(value).__name__}, {wanted.__name__} is "
                f"wanted: give one such as {model[key]!r}, which all layers have"
            )
    _one_of(f"{where}.mixer", get("mixer"), MIXERS)
    width, heads, attends = get("width"), get("heads"), get("mixer") in ATTENTION
    read = getattr(MIXERS[get("mixer")], "READS", 1) if attends else get("expand")
    if not attends:
        _check_recurrent(where, get)
    elif not get("head_size") and width % heads:
        raise ConfigError(
            f"{where}.heads={heads} does not divide model.width={width}: "
            f"take one of {_divisors(width)}, or set model.head_size"
        )
    kv_heads = get("kv_heads") or heads
    if heads % kv_heads:
        raise ConfigError(
            f"{where}.kv_heads={kv_heads} does not divide {where}.heads={heads}: "
            f"take one of {_divisors(heads)}, or 0 for as many as heads"
        )
    _one_of(f"{where}.mlp", get("mlp"), MLPS)
    _one_of(f"{where}.backend", get("backend"), BACKENDS)
    _one_of(f"{where}.biases", get("biases"), BIASES)
    for key in ("window", "score_cap", "score_scale", "hidden", "head_size", "kv_heads"):
        if get(key) < 0:
            raise ConfigError(f"{where}.{key}={get(key)} is negative: 0 turns it off or derives it")
    if not get("pre_norm") and not get("post_norm"):
        raise ConfigError(
            f"{where}.pre_norm=False leaves layers without norms: set {where}.post_norm=True too"
        )
    if get("residual_scale") <= 0:
        raise ConfigError(
            f"{where}.residual_scale={get('residual_scale')} must be more than 0: 1 leaves what "
            "layers add as it is"
        )
    encoding = positions.make(get("positions")) if attends else positions.NoPE()
    layer = LayerSpec(
        mixer=get("mixer"),
        mlp=get("mlp"),
        width=width,
        hidden=get("hidden") or _hidden(width, get("mlp")),
        heads=heads,
        kv_heads=kv_heads,
        head_size=get("head_size") or round(width * read) // heads,
        window=get("window"),
        score_cap=get("score_cap"),
        score_scale=get("score_scale"),
        norm=get("norm"),
        norm_eps=get("norm_eps"),
        residual_scale=float(get("residual_scale")),
        pre_norm=get("pre_norm"),
        post_norm=get("post_norm"),
        qk_norm=get("qk_norm"),
        parallel=get("parallel"),
        biases=get("biases"),
        positions=encoding,
        depth=get("depth"),
        length=length,
        backend=get("backend"),
        **{key: 0 if attends else get(key) for key in RECURRENT_KEYS},
        options=_options(f"{where}.options", MIXERS[get("mixer")], get("options")),
        mlp_options=_options(f"{where}.mlp_options", MLPS[get("mlp")], get("mlp_options")),
        extension=_extension(where, get("mixer"), get("extension"), overrides),
    )
    layer = dataclasses.replace(layer, positions=encoding.resolved(layer.dims))
    for part in (MIXERS[layer.mixer], MLPS[layer.mlp]):
        if hasattr(part, "check"):
            part.check(layer)
    layer.positions.check(layer.dims)
    return layer


# What layers must have alike if they use one block.
BLOCK_KEYS = "heads", "kv_heads", "head_size", "hidden", "mlp", "biases"


def _check_shared(model: Any, layers: tuple[LayerSpec, ...]) -> None:
    """Refuses uses of a shared block that nobody reads, or of a block of several shapes."""
    kinds = [n % len(layers) for n in range(model.depth)]
    for kind, after in zip(kinds, [*kinds[1:], 0], strict=True):
        last = after <= kind  # of a round, or of the model
        if layers[kind].shares and (last or layers[after].shares):
            raise ConfigError(
                f"model.pattern has {model.pattern[kind]!r}, of shared_attention, with nothing "
                f"behind it that reads what it gives at model.depth={model.depth}: let a layer of "
                "another mixer follow it, within the pattern"
            )
    first: dict[int, LayerSpec] = {}
    for layer in layers:
        if layer.shares:
            other = first.setdefault(layer.option("block"), layer)
            for key in BLOCK_KEYS:
                if getattr(layer, key) != getattr(other, key):
                    raise ConfigError(
                        f"block {layer.option('block')} of shared_attention has "
                        f"{key}={getattr(other, key)} in one kind of layer and "
                        f"{getattr(layer, key)} in another: make them equal, or take another block"
                    )


def _options(where: str, part: Any, given: str) -> tuple[tuple[str, Any], ...]:
    """The options of a mixer or an MLP: its defaults, and what `NAME=VALUE,...` gives instead."""
    options = dict(getattr(part, "OPTIONS", {}))
    what = "this MLP" if where.endswith("mlp_options") else "this mixer"
    options |= settings(where, given, options, what)
    for name, (least, most) in getattr(part, "LIMITS", {}).items():
        if not least <= options[name] <= most:
            raise ConfigError(
                f"{where}={given!r}: {name}={options[name]} must lie from {least} to "
                f"{most}; {name}={part.OPTIONS[name]} is what it has if nothing is said"
            )
    return tuple(sorted(options.items()))


def _extension(where: str, mixer: str, given: str, overrides: Any) -> Extension:
    """What is done to a recurrence; what is none is left alone by what is said of all layers."""
    if not _extends(mixer) and "extension" not in overrides:
        return Extension()
    return interventions.parsed(where, given, mixer, _extends(mixer))


def _extends(mixer: str) -> frozenset[str]:
    """What may be done to a mixer: nothing to attention, convolutions and channel mixing."""
    return getattr(MIXERS.get(mixer), "EXTENDS", frozenset())


# What an attention layer has nothing of.
RECURRENT_KEYS = "state", "conv", "expand", "groups", "recurrence_chunk"


def _check_recurrent(where: str, get: Any) -> None:
    """Refuses sizes of a recurrent layer that do not go together."""
    for key in ("heads", *RECURRENT_KEYS[:-1]):
        if get(key) <= 0:
            raise ConfigError(f"{where}.{key}={get(key)} must be more than 0")
    if get("recurrence_chunk") < 0:
        raise ConfigError(
            f"{where}.recurrence_chunk={get('recurrence_chunk')} is negative: 0 chooses it"
        )
    heads, groups, inner = get("heads"), get("groups"), get("width") * get("expand")
    channels = f"{inner:g} channels (model.width={get('width')} times expand={get('expand'):g})"
    if not float(inner).is_integer():
        raise ConfigError(f"{where} has {channels}: choose {where}.expand so that they are whole")
    inner = round(inner)
    if inner % heads:
        raise ConfigError(
            f"{where}.heads={heads} does not divide {channels}: take one of {_divisors(inner)}"
        )
    if get("head_size") not in (0, inner // heads):
        raise ConfigError(
            f"{where}.head_size={get('head_size')} times {where}.heads={heads} is not {channels}: "
            f"take head_size={inner // heads}, or 0 to derive it"
        )
    if heads % groups:
        raise ConfigError(
            f"{where}.groups={groups} does not divide {where}.heads={heads}: take one of "
            f"{_divisors(heads)}"
        )


LAYER_KEYS = frozenset(
    [
        "mixer",
        "mlp",
        "hidden",
        "heads",
        "kv_heads",
        "head_size",
        "window",
        "score_cap",
        "score_scale",
        "residual_scale",
        "pre_norm",
        "post_norm",
        "qk_norm",
        "parallel",
        "biases",
        "positions",
        "backend",
        "options",
        "mlp_options",
        "extension",
        *RECURRENT_KEYS,
    ]
)


def _hidden(width: int, mlp: str) -> int:
    """4 D for two matrices, the same number of weights for three, rounded up to 64."""
    matrices = MLPS[mlp].matrices
    return -(-8 * width // (matrices * 64)) * 64 if matrices else 0


def _positive(model: Any, *keys: str) -> None:
    for key in keys:
        if model[key] < 1:
            raise ConfigError(f"model.{key}={model[key]} must be at least 1")


def _one_of(key: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value!r} is unknown: choose from {', '.join(choices)}")


def _divisors(n: int) -> str:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return ", ".join(map(str, sorted({*small, *(n // d for d in small)})))
