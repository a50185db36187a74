"""Learning-rate schedules and optimisers, from optax."""

import re
from typing import Any

import jax
import optax

from lcm.errors import ConfigError
from lcm.parallel import path

# Norms, biases, embeddings, decays and whatever an encoding learns are not pulled towards zero.
UNDECAYED = r"(norm/(scale|bias)|_bias|embedding/table|_(log|re|im)|a_param|mixer/D|positions/.+)$"
MATRICES = r"layers/\w+/(mixer|mlp)/\w+$"
SHARED = r"blocks/\w+/(mlp/)?\w+$"  # of no layer alone, so without an axis of layers


def schedule(train: Any) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then cosine, warm-up-stable-decay or constant.

    Raises:
        ConfigError: for an unknown schedule, or a warm-up that leaves no steps.
    """
    if train.steps < 1:
        raise ConfigError(f"train.steps={train.steps} must be at least 1")
    if not 0 <= train.warmup <= train.steps:
        raise ConfigError(
            f"train.warmup={train.warmup} must lie between 0 and train.steps={train.steps}"
        )
    rest = train.steps - train.warmup
    low = train.lr * train.final_lr
    if train.schedule == "cosine":
        after = optax.cosine_decay_schedule(train.lr, max(1, rest), train.final_lr)
    elif train.schedule == "wsd":
        fall = min(rest, round(train.decay * train.steps))
        line = optax.linear_schedule(train.lr, low, max(1, fall))
        after = optax.join_schedules([optax.constant_schedule(train.lr), line], [rest - fall])
    elif train.schedule == "constant":
        after = optax.constant_schedule(train.lr)
    else:
        raise ConfigError(
            f"train.schedule={train.schedule!r} is unknown: choose from cosine, wsd, constant"
        )
    if not train.warmup:
        return after
    # Step 1 already learns: the ramp is lr/warmup, 2 lr/warmup, ... lr.
    ramp = optax.linear_schedule(train.lr / train.warmup, train.lr, max(1, train.warmup - 1))
    return optax.join_schedules([ramp, after], [train.warmup])


def optimizer(train: Any) -> optax.GradientTransformation:
    """Clipping, then AdamW, or Muon for the matrices of layers and AdamW for the rest.

    Raises:
        ConfigError: for an unknown optimiser.
    """
    rate = schedule(train)
    if train.optimizer == "adamw":
        rule = optax.adam(rate, train.b1, train.b2)
    elif train.optimizer == "muon":
        rule = optax.contrib.muon(
            rate,
            adam_b1=train.b1,
            adam_b2=train.b2,
            muon_weight_dimension_numbers=_muon_dimensions,
            # Updates the size of Adam's, so that both groups share one learning rate (Liu et al.,
            # 2025, arXiv:2502.16982).
            consistent_rms=0.2,
        )
    else:
        raise ConfigError(
            f"train.optimizer={train.optimizer!r} is unknown: choose from adamw, muon"
        )
    # Decoupled decay after either, in proportion to the learning rate, as in optax.adamw; muon's
    # own has no mask for the parameters that it leaves to Adam.
    decay = optax.add_decayed_weights(lambda step: -rate(step) * train.weight_decay, _decayed)
    clip = optax.clip_by_global_norm(train.clip) if train.clip else optax.identity()
    whole = optax.chain(clip, rule, decay)
    if not train.only:
        return whole
    rules, only = {"tuned": whole, "frozen": optax.set_to_zero()}, _pattern(train.only)
    return optax.partition(rules, lambda params: _tuned(params, only))


def _pattern(only: str) -> re.Pattern:
    try:
        return re.compile(only)
    except re.error as error:
        raise ConfigError(f"train.only={only!r} is no regular expression: {error}") from error


def _tuned(params: Any, only: re.Pattern) -> Any:
    """Which parameters are trained, by the names `tuned` and `frozen`.

    Raises:
        ConfigError: if none is.
    """
    names = [path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    if not any(only.search(name) for name in names):
        raise ConfigError(
            f"train.only={only.pattern!r} is found in no parameter, so nothing would be trained: "
            f"they are {', '.join(names)}"
        )
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: "tuned" if only.search(path(keys)) else "frozen", params
    )


def _decayed(params: Any) -> Any:
    """Which parameters are pulled towards zero."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: not re.search(UNDECAYED, path(keys)), params
    )


def _is_matrix(name: str, leaf: Any) -> bool:
    """Whether it multiplies vectors, which rates by channel and state do not."""
    axes = 2 if re.search(SHARED, name) else 3 if re.search(MATRICES, name) else 0
    return leaf.ndim == axes and not re.search(UNDECAYED, name)


def _muon_dimensions(params: Any) -> Any:
    """Which parameters Muon takes, each as [layer, in, out] with layers apart, or [in, out]."""

    def dimensions(keys: tuple, leaf: Any) -> Any:
        if not _is_matrix(path(keys), leaf):
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)
