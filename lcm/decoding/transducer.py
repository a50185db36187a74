"""Label sequences from a transducer: greedily, many rows at once, and by beam search."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm.errors import ConfigError
from lcm.models import decoder, transducer
from lcm.models.transducer import TransducerSpec
from lcm.ops.transducer import BLANK
from lcm.types import Array


class Hypothesis(NamedTuple):
    """Labels and `log Pr` of them: the sum over the alignments that the search has followed."""

    labels: tuple[int, ...]
    log_probability: float


def greedy(
    spec: TransducerSpec,
    params: decoder.Params,
    frames_BT: Array,
    frames_B: Array,
    *,
    most: int,
    per_frame: int = 10,
) -> list[list[int]]:
    """The likeliest symbol at each node, of every row, until its frames are read.

    most: labels of a row, after which it advances alone. per_frame: those of one frame.

    Raises:
        ConfigError: for a limit below 1, or frames without a row that has some.
    """
    if most < 1 or per_frame < 1:
        raise ConfigError(f"most={most}, per_frame={per_frame}: give 1 or more labels of each")
    if frames_BT.shape[1] < 1 or int(np.min(frames_B)) < 1:
        raise ConfigError(f"rows of {np.asarray(frames_B).tolist()} frames: give 1 or more each")
    labels_BU, count_B = _greedy(spec, params, frames_BT, frames_B, most, per_frame)
    rows = zip(np.asarray(labels_BU), np.asarray(count_B), strict=True)
    return [labels[:count].tolist() for labels, count in rows]


class _Walk(NamedTuple):
    """Where each row is: its frame, labels and how many, those of this frame, the network."""

    t_B: Array
    labels_BU: Array
    count_B: Array
    here_B: Array
    g_BD: Array
    state: Any


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _greedy(
    spec: TransducerSpec,
    params: decoder.Params,
    frames_BT: Array,
    frames_B: Array,
    most: int,
    per_frame: int,
) -> tuple[Array, Array]:
    f_BTD = transducer.transcribe(spec, params, frames_BT, frames_B)
    batch = len(f_BTD)
    zero_B = jnp.zeros(batch, jnp.int32)
    state = decoder.init_state(spec.prediction, batch, most + 1)
    g_BD, state = transducer.predicted(spec, params, zero_B + BLANK, zero_B == 0, state)
    labels_BU = jnp.zeros((batch, most), jnp.int32)

    def unread(walk: _Walk) -> Array:
        return (walk.t_B < frames_B).any()

    def move(walk: _Walk) -> _Walk:
        row_B = jnp.arange(batch)
        at_B = jnp.minimum(walk.t_B, frames_B - 1)
        best_B = transducer.join(spec, params, f_BTD[row_B, at_B], walk.g_BD).argmax(-1)
        room_B = (walk.count_B < most) & (walk.here_B < per_frame) & (walk.t_B < frames_B)
        gives_B = room_B & (best_B != BLANK)
        place_B = jnp.where(gives_B, walk.count_B, most)  # out of range, and so dropped
        labels_BU = walk.labels_BU.at[row_B, place_B].set(best_B, mode="drop")
        g_BD, state = transducer.predicted(spec, params, best_B, gives_B, walk.state)
        return _Walk(
            jnp.where(gives_B, walk.t_B, walk.t_B + 1),
            labels_BU,
            walk.count_B + gives_B,
            jnp.where(gives_B, walk.here_B + 1, 0),
            jnp.where(gives_B[:, None], g_BD, walk.g_BD),
            state,
        )

    walk = _Walk(zero_B, labels_BU, zero_B, zero_B, g_BD, state)
    walk = jax.lax.while_loop(unread, move, walk)
    return walk.labels_BU, walk.count_B


# Log-probabilities of blank and labels at a frame, after labels.
Symbols = Callable[[int, tuple[int, ...]], np.ndarray]


def beam_search(symbols: Symbols, frames: int, width: int, most: int) -> list[Hypothesis]:
    """Graves, 2012, section 2.5: the `width` best sequences, best by `log Pr(y) / |y|` first.

    symbols: `symbols(t, labels)` is float `[V]`, blank first; it is asked for many pairs twice.
    most: labels of a sequence, so that a frame ends where every label is likelier than blank.

    Each frame first adds to a sequence what reaches it from its proper prefixes in the beam by
    labels of this frame alone, then takes out the likeliest until `width` that have passed the
    frame are likelier than all that have not.

    Raises:
        ConfigError: for frames, a width or a number of labels below 1.
    """
    if frames < 1 or width < 1 or most < 1:
        raise ConfigError(f"frames={frames}, width={width}, most={most}: give 1 or more of each")
    passed: dict[tuple[int, ...], float] = {(): 0.0}
    for t in range(frames):
        at = functools.lru_cache(None)(functools.partial(symbols, t))
        open_ = _with_prefixes(passed, at)
        passed = {}
        while open_:
            best = max(open_, key=open_.__getitem__)
            if sum(score > open_[best] for score in passed.values()) >= width:
                break
            score, log_p = open_.pop(best), at(best)
            passed[best] = float(np.logaddexp(passed.get(best, -np.inf), score + log_p[BLANK]))
            if len(best) < most:
                for label in range(1, len(log_p)):
                    longer = (*best, label)
                    # A sequence that has passed, or that is open with its prefixes' share in it,
                    # has this way already.
                    if longer not in passed and longer not in open_:
                        open_[longer] = score + float(log_p[label])
        passed = dict(sorted(passed.items(), key=lambda item: -item[1])[:width])
    found = [Hypothesis(labels, score) for labels, score in passed.items()]
    return sorted(found, key=lambda one: -one.log_probability / max(1, len(one.labels)))


def _with_prefixes(
    passed: dict[tuple[int, ...], float], at: Callable[[tuple[int, ...]], np.ndarray]
) -> dict[tuple[int, ...], float]:
    """Each sequence with all ways of this frame from its proper prefixes among them.

    The shares are of the beam as the last frame left it: a prefix of a prefix counts once.
    """
    total = {}
    for labels, score in passed.items():
        ways = [score]
        for size in range(len(labels)):
            if labels[:size] in passed:
                steps = [at(labels[:n])[labels[n]] for n in range(size, len(labels))]
                ways.append(passed[labels[:size]] + float(np.sum(steps)))
        total[labels] = float(np.logaddexp.reduce(ways))
    return total


def symbols_of(
    spec: TransducerSpec, params: decoder.Params, frames: Sequence[int], padded: int = 0
) -> Symbols:
    """`symbols` of a model for one row of frames; labels are read once each, as they come.

    padded: frames that rows are filled up to, so that one program serves rows of several lengths.

    Raises:
        ConfigError: for a prediction network that attends.
    """
    frames_BT = np.zeros((1, max(padded, len(frames))), np.int32)
    frames_BT[0, : len(frames)] = frames
    f_TD = _transcribed(spec, params, frames_BT, jnp.asarray([len(frames)], jnp.int32))[0]
    start = decoder.init_state(spec.prediction, 1, 1)
    if any(hasattr(layer, "slots") for layer in start.layers):
        raise ConfigError(
            "the prediction network attends, and its cache has one length: beam search keeps a "
            "state for each sequence, so give it recurrent layers, or decode greedily"
        )

    @functools.cache
    def read(labels: tuple[int, ...]) -> tuple[Array, Any]:
        label = labels[-1] if labels else BLANK
        state = read(labels[:-1])[1] if labels else start
        return _one_label(spec, params, jnp.asarray([label], jnp.int32), state)

    @functools.cache
    def rows(labels: tuple[int, ...]) -> np.ndarray:
        """Log-probabilities at every frame after labels, `[T, V]`."""
        return np.asarray(_joined(spec, params, f_TD, read(labels)[0]), np.float64)

    return lambda t, labels: rows(labels)[t]


_transcribed = jax.jit(transducer.transcribe, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _one_label(spec: TransducerSpec, params: decoder.Params, label_B: Array, state: Any) -> Any:
    return transducer.predicted(spec, params, label_B, label_B >= 0, state)


@functools.partial(jax.jit, static_argnums=0)
def _joined(spec: TransducerSpec, params: decoder.Params, f_TD: Array, g_BD: Array) -> Array:
    return jax.nn.log_softmax(transducer.join(spec, params, f_TD, g_BD))
