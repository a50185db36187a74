"""An RNN transducer of lcm's own layers (Graves, 2012, arXiv:1211.3711; 2013, arXiv:1303.5778).

The transcription network reads the frames, in one direction or both (`lcm.models.encoder`), the
prediction network the labels given so far, and a joint scores blank and labels at each pair:

    sum     f_t + g_u                             2012
    tanh    W tanh(A f_t + B g_u + b)             2013

Both networks are decoders of any mixers. Where the paper begins the labels with a vector of zeros,
the prediction network reads the embedding of blank, which is learned.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.models import decoder
from lcm.models.encoder import check_counts, encode_tokens, rows
from lcm.models.spec import ModelSpec
from lcm.nn.functional import functional
from lcm.nn.joint import JOINTS
from lcm.ops.transducer import BLANK, transducer_loss
from lcm.types import Array, Tokens


@dataclasses.dataclass(frozen=True)
class TransducerSpec:
    """Two networks and a joint; `prediction.vocab` is labels and blank.

    Raises:
        ConfigError: for an unknown joint, or no label beside blank.
    """

    transcription: ModelSpec
    prediction: ModelSpec
    joint: str = "tanh"
    both_directions: bool = True

    def __post_init__(self) -> None:
        if self.joint not in JOINTS:
            raise ConfigError(f"joint {self.joint!r} is unknown: choose from {', '.join(JOINTS)}")
        if self.prediction.vocab < 2:
            raise ConfigError(
                f"the prediction network has {self.prediction.vocab} symbol: give it blank and a "
                "label or more, model.vocab=2 and up"
            )
        if self.both_directions and self.transcription.depth < 2:
            raise ConfigError(
                f"a transcription network of depth {self.transcription.depth} reads in one "
                "direction: give it two layers or more, or both_directions=False"
            )


class Pairs(NamedTuple):
    """Frames and labels of a batch, int32, padded with anything behind what is theirs."""

    frames_BT: Array
    frames_B: Array
    labels_BU: Array
    labels_B: Array


@functools.cache
def _joint(spec: TransducerSpec) -> Any:
    make, widths = JOINTS[spec.joint], (spec.transcription.width, spec.prediction.width)
    return functional(lambda rngs: make(*widths, spec.prediction.vocab, rngs))


def init(spec: TransducerSpec, key: jax.Array) -> decoder.Params:
    """Fresh parameters of the three networks."""
    first, second, third = jax.random.split(key, 3)
    return {
        "transcription": decoder.init(spec.transcription, first),
        "prediction": decoder.init(spec.prediction, second),
        "joint": _joint(spec).init(third),
    }


def loss(spec: TransducerSpec, params: decoder.Params, pairs: Pairs) -> Array:
    """`-log P(labels | frames)` of each row, nats, `[B]`.

    Raises:
        ValueError: for frames, labels and counts that do not go together.
    """
    if len(pairs.frames_BT) != len(pairs.labels_BU):
        raise ValueError(
            f"{len(pairs.frames_BT)} rows of frames for {len(pairs.labels_BU)} of labels: give as "
            "many"
        )
    check_counts(pairs.frames_BT, pairs.frames_B, 1)
    if pairs.labels_BU.size:  # else there is none to count
        check_counts(pairs.labels_BU, pairs.labels_B)
    f_BTD = transcribe(spec, params, pairs.frames_BT, pairs.frames_B)
    read_BU = jnp.pad(pairs.labels_BU, ((0, 0), (1, 0)), constant_values=BLANK)
    context = rows(read_BU, pairs.labels_B + 1)
    g_BUD, _ = decoder.hidden(spec.prediction, params["prediction"], read_BU, context, None)
    logits = join(spec, params, f_BTD[:, :, None], g_BUD[:, None])
    return transducer_loss(logits, pairs.labels_BU, pairs.frames_B, pairs.labels_B)


def transcribe(
    spec: TransducerSpec, params: decoder.Params, frames_BT: Tokens, frames_B: Array
) -> Array:
    """What the transcription network makes of frames, `[B, T, D]`."""
    grid = (frames_BT.shape[1],) if spec.both_directions else ()
    context = rows(frames_BT, frames_B)
    return encode_tokens(spec.transcription, params["transcription"], frames_BT, context, grid)


def join(spec: TransducerSpec, params: decoder.Params, f: Array, g: Array) -> Array:
    """float32 logits of blank and labels, `[..., V]`, of vectors whose leading axes broadcast."""
    return _joint(spec).apply(params["joint"], f, g)


def predicted(
    spec: TransducerSpec,
    params: decoder.Params,
    label_B: Array,
    there_B: Array,
    state: decoder.State,
) -> tuple[Array, decoder.State]:
    """The prediction network one label further, `[B, D]`; rows not `there` stay where they are."""
    context = rows(label_B[:, None], there_B.astype(jnp.int32), state.used_B[:, None])
    g_BLD, state = decoder.hidden(
        spec.prediction, params["prediction"], label_B[:, None], context, state
    )
    return g_BLD[:, 0], state
