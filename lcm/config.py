"""Configs: every key with its default and meaning, overrides, and where to read them from."""

import ast
import difflib
import importlib.machinery
import importlib.util
import math
import os
import pathlib
import traceback
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from lcm import data, positions
from lcm.errors import ConfigError, UserError

# Key: (default, meaning). The type of the default is the type of the key.
_KEYS: dict[str, tuple[Any, str]] = {
    "name": ("base", "name of the experiment, shown in reports"),
    "seed": (0, "seed of parameters, data order and everything else that is random"),
    "model.mixer": (
        "attention",
        "what mixes positions in kinds of layers that do not say; model.pattern names kinds",
    ),
    "model.mlp": (
        "swiglu",
        "feed-forward layer: swiglu, geglu (tanh GELU), geglu_exact (erf), gelu (tanh), "
        "gelu_exact, experts or none",
    ),
    "model.width": (128, "width of the residual stream, D"),
    "model.depth": (4, "number of layers"),
    "model.hidden": (0, "hidden width of the MLP, F; 0 takes 8/3 D (gated) or 4 D"),
    "model.heads": (4, "query heads, H"),
    "model.kv_heads": (0, "key/value heads, G; 0 takes as many as query heads"),
    "model.head_size": (0, "size of a head, K; 0 takes width / heads"),
    "model.positions": ("rope", "position encoding; its fields follow, as in positions.base"),
    "model.window": (0, "keys a query sees, itself included; 0 is all before it"),
    "model.score_cap": (0.0, "soft cap of attention scores; 0 is none"),
    "model.score_scale": (0.0, "factor of attention scores; 0 takes 1 / sqrt(head size)"),
    "model.biases": ("none", "biased matrices: none, qkv, attention, mixer, mlp, but_qkv or all"),
    "model.qk_norm": (False, "whether queries and keys are normalised by head (RMSNorm)"),
    "model.pre_norm": (True, "whether what mixer and MLP read is normalised; not so in OLMo 2"),
    "model.post_norm": (False, "whether what mixer and MLP add is normalised too, as in Gemma 2"),
    "model.residual_scale": (1.0, "factor of what mixer and MLP add, as in Granite"),
    "model.parallel": (False, "whether the MLP reads what the mixer reads, as in GPT-NeoX"),
    "model.backend": (
        "auto",
        "implementation of attention: auto, pallas, blockwise, reference",
    ),
    "model.context_attention": (
        "auto",
        "attention over mesh.context: auto, gather (of keys), ring, ulysses (by head)",
    ),
    "model.state": (128, "numbers that a channel of a recurrent layer keeps, N"),
    "model.conv": (4, "taps of the convolution before a recurrence, W"),
    "model.expand": (2.0, "channels of a recurrent layer, as a multiple of the width"),
    "model.groups": (1, "groups of heads that share B and C in Mamba-2, G"),
    "model.recurrence_chunk": (
        0,
        "tokens of a recurrence computed at once; 0 chooses by the device",
    ),
    "model.options": ("", "what only this mixer has, NAME=VALUE,...; see OPTIONS of its class"),
    "model.mlp_options": ("", "what only this MLP has, as options: count and top of experts"),
    "model.extension": (
        "",
        "what is done to recurrences so that they read longer, such as step=0.5 or window=4096; "
        "see lcm.nn.interventions",
    ),
    "model.pattern": (
        ("attention",),
        "kinds of layers, repeated over the depth: mixers by name, or keys of model.kinds",
    ),
    "model.kinds": ({}, "kinds by name: keys of model that differ in layers of that kind"),
    "model.vocab": (320, "rows of the embedding table, at least the tokenizer's size"),
    "model.tied": (True, "whether the embedding table is also the output matrix"),
    "model.logit_cap": (0.0, "soft cap of the logits; 0 is none"),
    "model.logit_divisor": (1.0, "what logits are divided by before any cap, as in Granite"),
    "model.embed_scale": (1.0, "factor of token embeddings; sqrt(D) in Gemma"),
    "model.embed_norm": (False, "whether token embeddings are normalised, as in BLOOM"),
    "model.norm": ("rms", "normalisation: rms, layer (LayerNorm) or layer_no_bias"),
    "model.norm_eps": (1e-6, "added to the mean square in norms"),
    "model.dtype": ("float32", "dtype of computation; parameters, softmax and loss stay float32"),
    "model.remat": (
        "none",
        "recomputed backward: none, dots (all but matmuls), full, offload (full, inputs on host)",
    ),
    "model.unroll": (0, "rounds of the pattern per step of the scan; 0: all on a CPU, 1 elsewhere"),
    "data.length": (256, "tokens in a training row, L"),
    **{f"data.{key}": described for key, described in data.defaults().items()},
    "train.steps": (1000, "optimiser steps"),
    "train.batch": (16, "rows in a batch, over all devices"),
    "train.accumulate": (1, "microbatches whose gradients make one step; divides batch"),
    "train.optimizer": ("adamw", "adamw or muon (matrices by Muon, the rest by AdamW)"),
    "train.lr": (3e-3, "peak learning rate"),
    "train.schedule": ("cosine", "after the warm-up: cosine, wsd or constant"),
    "train.warmup": (100, "steps of linear warm-up from 0"),
    "train.decay": (0.2, "share of the steps in which wsd falls"),
    "train.final_lr": (0.1, "learning rate at the end, as a share of the peak"),
    "train.b1": (0.9, "decay of Adam's first moment"),
    "train.b2": (0.95, "decay of Adam's second moment"),
    "train.weight_decay": (0.1, "decoupled decay of matrices; none on norms and embeddings"),
    "train.clip": (1.0, "largest global norm of the gradient; 0 is no limit"),
    "train.z_loss": (1e-4, "coefficient of the squared log-normaliser; 0 is none"),
    "train.ema": (0.0, "decay of a moving average of the parameters; 0 keeps none"),
    "train.init": ("", "workdir of a run whose parameters this one begins with; empty: fresh ones"),
    "train.only": ("", "regular expression: parameters whose path has it are trained; empty: all"),
    "train.initial_state": (
        "zero",
        "what recurrent states begin with: zero, noise, fitted (to final ones), passed (of other "
        "rows of the batch before) or continued (of the same, whose text goes on)",
    ),
    "train.initial_std": (0.1, "standard deviation of train.initial_state=noise"),
    "train.placement": ("plain", "where training tokens stand; its fields follow"),
    "train.log_every": (10, "steps between lines of metrics"),
    "train.hang_seconds": (
        900,
        "seconds without the end of a step (the first: ten times as many) after which stacks are "
        "written, and one of several processes ends; 0 never",
    ),
    "train.position_bins": (16, "bins of the loss by position in the metrics"),
    "checkpoint.every": (500, "steps between checkpoints; the last step is always saved"),
    "checkpoint.keep": (2, "newest checkpoints that are kept"),
    "mesh.data": (-1, "devices on the data axis; one axis may be -1, the rest of the devices"),
    "mesh.fsdp": (1, "devices over which parameters and batch are sharded"),
    "mesh.context": (1, "devices over which the sequence is sharded"),
    "mesh.order": (
        "plain",
        "tokens over context: plain, or zigzag or striped, which balance causal attention",
    ),
    "mesh.tensor": (1, "devices over which heads and hidden width are sharded"),
    "eval.multiples": ((1, 2, 4, 8), "lengths evaluated, as multiples of data.length"),
    "eval.tokens": (65_536, "held-out tokens scored at each length, at the most"),
    "eval.batch_tokens": (4096, "tokens in one call of the model"),
    "eval.stride": (0, "tokens between sliding windows; 0 is half of the training length"),
}

# Keys that hold a value by its name and fields.
_ENTRIES = {"positions": positions.config, "placement": positions.placement_config}

# What numbers may be, from the first up to but without the second; other integers are sizes or
# counts below 2^31, and every float is finite. What depends on several keys is checked where they
# meet: in lcm.models, lcm.parallel, lcm.data and lcm.training.
_LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32),
    "model.logit_cap": (0, math.inf),
    "model.norm_eps": (0, math.inf),
    "data.length": (1, 2**31),
    "train.lr": (0, math.inf),
    "train.decay": (0, math.inf),
    "train.final_lr": (0, math.inf),
    "train.b1": (0, 1),
    "train.b2": (0, 1),
    "train.weight_decay": (0, math.inf),
    "train.clip": (0, math.inf),
    "train.z_loss": (0, math.inf),
    "train.initial_std": (0, math.inf),
    "train.hang_seconds": (0, 2**31),
    "eval.multiples": (1, 2**31),
    "eval.tokens": (0, 2**31),
    "eval.batch_tokens": (1, 2**31),
    "eval.stride": (0, 2**31),
}
_COUNTS = (-(2**31), 2**31)
_FINITE = (-math.inf, math.inf)


def base() -> ConfigDict:
    """The default config: a byte-level decoder of 0.9M parameters on the standard library."""
    tree: dict[str, Any] = {}
    for key, (default, _) in _KEYS.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = _ENTRIES[last](default) if last in _ENTRIES else default
    return ConfigDict(tree)


def with_defaults(cfg: ConfigDict) -> ConfigDict:
    """The config of an earlier version, the keys of its groups that it lacks at their defaults."""
    defaults = base()
    for key in _KEYS:
        *parents, last = key.split(".")
        node, default = cfg, defaults
        for parent in parents:
            node = node.get(parent) if isinstance(node, ConfigDict) else None
            default = default[parent]
        if parents and isinstance(node, ConfigDict) and last not in node:
            node[last] = default[last]
    return cfg


def shrink(cfg: ConfigDict) -> ConfigDict:
    """Makes a config small enough for a test, keeping everything that is not a size."""
    cfg.model.update(width=32, depth=max(2, len(cfg.model.pattern)), heads=2, head_size=0)
    cfg.model.update(state=min(cfg.model.state, 8), recurrence_chunk=8)
    cfg.model.update(hidden=0, kv_heads=min(cfg.model.kv_heads, 1))
    for kind in cfg.model.kinds.values():
        if "head_size" in kind:
            kind.head_size = 0
    cfg.data.length = 32
    cfg.train.update(steps=20, warmup=4, batch=8, log_every=5)
    cfg.checkpoint.every = 10
    cfg.eval.update(tokens=2048, batch_tokens=1024)
    return cfg


def published(name: str, shape: Iterable[str], arg: str) -> ConfigDict:
    """The config of a published shape: as it is (`""`), for rows of a number of tokens, a batch
    having as many as before, or `"tiny"` for a run of seconds.

    Raises:
        ConfigError: for another argument.
    """
    cfg = override(base(), shape)
    cfg.name = name
    if arg == "tiny":
        cfg.model.vocab = 320
        shrink(cfg)
    elif arg.isdigit() and int(arg):
        cfg.train.batch = max(1, cfg.train.batch * cfg.data.length // int(arg))
        cfg.data.length = int(arg)
    elif arg:
        raise unknown_argument(arg, "tiny", "a number of tokens")
    return cfg


def unknown_argument(arg: str, *known: str) -> ConfigError:
    """The error for an argument that a `get_config` does not know."""
    return ConfigError(f"config argument {arg!r} is unknown: use {' or '.join(known)}, or none")


def load(spec: str) -> ConfigDict:
    """The config of `path.py` or `path.py:arg`: what its `get_config(arg)` returns.

    Raises:
        ConfigError: if there is no such file, it cannot be run, or what it returns is no config
            with the keys of `base()`.
    """
    path, _, arg = spec.partition(":")
    if not os.path.isfile(path):
        folder = pathlib.Path(path).parent
        near = sorted(str(p) for p in folder.glob("*.py")) if os.path.isdir(folder) else []
        there = f"{folder} holds {', '.join(near)}" if near else "check the path"
        raise ConfigError(f"config {path} does not exist: {there}")
    cfg = _run(path, arg)
    if not isinstance(cfg, ConfigDict):
        raise ConfigError(
            f"get_config of {path} returns {type(cfg).__name__}, not a ConfigDict: "
            "let it change and return lcm.config.base()"
        )
    check_keys(cfg)
    return cfg


def _run(path: str, arg: str) -> Any:
    """What `get_config(arg)` of a Python file returns."""
    name = f"lcm_config_{pathlib.Path(path).stem}"
    loader = importlib.machinery.SourceFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    try:
        loader.exec_module(module)
        if hasattr(module, "get_config"):
            return module.get_config(arg)
    except UserError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"config {path} is not Python: {error}: mend it") from error
    except Exception as error:  # whatever the code of a config does
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"line {lines[-1]}" if lines else "get_config(arg)"
        what = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"config {path} fails at {where} with {type(error).__name__}: {what}: mend it"
        ) from error
    raise ConfigError(f"config {path} defines no get_config(arg): add one that returns a config")


def override(cfg: ConfigDict, assignments: Iterable[str]) -> ConfigDict:
    """A copy of the config with assignments `a.b=value` made in the order given.

    `model.positions=NAME` chooses an encoding with its defaults, after which its own fields can
    be assigned, and so does a field that is an encoding, such as `model.positions.rope`;
    `model.kinds.KIND.KEY` may name keys that are not there yet. Other keys must exist, and values
    must have the type of what they replace.

    Raises:
        ConfigError: naming key, value and remedy.
    """
    cfg = cfg.copy_and_resolve_references()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--config.{assignment} assigns nothing: write --config.{key}=VALUE")
        parent = key.removesuffix(".name")
        _assign(cfg, parent if parent.split(".")[-1] in _ENTRIES else key, text)
    check_keys(cfg)
    return cfg


def describe(cfg: ConfigDict) -> list[tuple[str, str, Any]]:
    """Every key with its meaning and its value in this config, in the order of the table."""
    values = dict(_flat(cfg))
    rows = []
    for key, (_, meaning) in _KEYS.items():
        if key.split(".")[-1] in _ENTRIES:
            rows.append((key, meaning, values[f"{key}.name"]))
            fields = [k for k in values if k.startswith(f"{key}.") and not k.endswith(".name")]
            rows += [(k, f"field of {values[f'{key}.name']}", values[k]) for k in fields]
        else:
            rows.append((key, meaning, _written(values[key])))
    return rows


def check_keys(cfg: ConfigDict) -> None:
    """Refuses keys that `base()` does not have or that are missing, and values that cannot be.

    Raises:
        ConfigError: naming key, value and the nearest known key or the remedy.
    """
    values = dict(_flat(cfg))
    for key, value in values.items():
        if key in ("model.positions", "train.placement"):
            maker = _ENTRIES[key.split(".")[-1]].__name__
            raise ConfigError(
                f"config.{key}={value!r} is no entry: assign one made by lcm.positions.{maker}, "
                f"such as lcm.positions.{maker}({_KEYS[key][0]!r})"
            )
        if key == "model.kinds":
            _check_kinds(value)
            continue
        if not key.startswith(_FREE):
            if key not in _KEYS:
                raise _unknown(key, base())
            value = _typed(key, value, _KEYS[key][0])
        _check_limits(key, value)
    for key in _KEYS:
        if key not in values and f"{key}.name" not in values:
            raise ConfigError(f"config.{key} is missing: start from lcm.config.base()")


def _check_kinds(kinds: Any) -> None:
    for name, entry in kinds.items() if isinstance(kinds, ConfigDict) else [("", kinds)]:
        if not isinstance(entry, ConfigDict):
            raise ConfigError(
                f"config.model.kinds.{name}={entry!r} holds no keys: write "
                f"--config.model.kinds.{name or 'KIND'}.KEY=VALUE"
            )
        for key, value in entry.items():
            _check_limits(f"model.kinds.{name}.{key}", value)


def _check_limits(key: str, value: Any) -> None:
    like = f", such as the default {_written(_KEYS[key][0])}" if key in _KEYS else ""
    if value == () and not key.startswith(_FREE):
        raise ConfigError(f"config.{key} is empty: give one or more{like}")
    for number in value if isinstance(value, tuple) else (value,):
        if type(number) not in (int, float):
            continue
        low, high = _LIMITS.get(key, _COUNTS if type(number) is int else _FINITE)
        if not (math.isfinite(number) and low <= number < high):
            end = "finite" if math.isinf(high) else f"below {high}"
            start = "" if math.isinf(low) else f"at least {low} and "
            raise ConfigError(f"config.{key}={_written(value)} must be {start}{end}{like}")


# Entries with keys of their own, which lcm.positions and lcm.models check.
_FREE = ("model.positions.", "model.kinds.", "train.placement.")


def _flat(node: ConfigDict, prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in node.items():
        if isinstance(value, ConfigDict) and prefix + key not in ("model.kinds",):
            items += _flat(value, f"{prefix}{key}.")
        else:
            items.append((prefix + key, value))
    return items


def _assign(cfg: ConfigDict, key: str, text: str) -> None:
    *parents, last = key.split(".")
    if key.startswith("model.kinds.") and len(parents) >= 3:
        kinds = cfg.model.kinds
        if parents[2] not in kinds:
            with kinds.unlocked():
                kinds[parents[2]] = ConfigDict()
        node = kinds[parents[2]]
        if len(parents) == 3 and last not in node and last in cfg.model and last != "positions":
            node[last] = cfg.model[last]
        parents = parents[3:]
    else:
        node = cfg
    for parent in parents:
        if not isinstance(node, ConfigDict) or parent not in node:
            raise _unknown(key, cfg)
        node = node[parent]
    entry = isinstance(node, ConfigDict) and isinstance(node.get(last), ConfigDict)
    field = isinstance(node, ConfigDict) and "name" in node  # of cfg itself, or of an entry
    if (last in _ENTRIES and not field) or (entry and "name" in node[last]):
        with node.unlocked():
            if last in node:
                del node[last]
            node[last] = ConfigDict(_ENTRIES.get(last, positions.config)(text))
        return
    if not isinstance(node, ConfigDict) or last not in node:
        raise _unknown(key, cfg)
    if isinstance(node[last], ConfigDict):
        inside = ", ".join(f"{key}.{name}" for name in node[last]) or "no keys yet"
        raise ConfigError(f"--config.{key}={text}: {key} is a group, assign to {inside}")
    with node.ignore_type():
        node[last] = _typed(key, _literal(text, node[last]), node[last])


def _literal(text: str, default: Any) -> Any:
    """The value a text stands for: a string where one is wanted, a Python literal elsewhere."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if isinstance(default, tuple) and not text.startswith(("(", "[")):
        like = default[0] if default else 0.0  # a tuple that may be empty holds numbers
        return tuple(_literal(item.strip(), like) for item in text.split(",") if text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: deep nesting
        return text
    return tuple(value) if isinstance(default, tuple) and isinstance(value, list) else value


def _typed(key: str, value: Any, default: Any) -> Any:
    wanted = type(default)
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is int and type(value) is float and value.is_integer():
        return int(value)  # 1e5 steps
    if type(value) is not wanted:
        raise ConfigError(
            f"config.{key}={value!r} is of type {type(value).__name__}, {wanted.__name__} is "
            f"wanted: write it as --config.{key}={_written(default)}"
        )
    if wanted is tuple and default and any(type(v) is not type(default[0]) for v in value):
        raise ConfigError(
            f"config.{key}={value!r} must hold {type(default[0]).__name__} values only: write it "
            f"as --config.{key}={_written(default)}"
        )
    return value


def _written(value: Any) -> str:
    if isinstance(value, ConfigDict):
        return str(value.to_dict())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _unknown(key: str, cfg: ConfigDict) -> ConfigError:
    """The error for a key that is not there, with the one that was probably meant."""
    parents = key.split(".")[:-1]
    if parents[:2] == ["model", "kinds"] and len(parents) == 3:
        known = [".".join([*parents, name]) for name in cfg.model if name != "kinds"]
    else:
        known = [name.removesuffix(".name") for name, _ in _flat(cfg)]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean config.{near[0]}?" if near else "lcm train --help lists the keys"
    return ConfigError(f"config.{key} is unknown: {hint}")
