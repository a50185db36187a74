"""Recurrent Context Compression (2024, arXiv:2406.06110): what is long, read as a short prefix.

An encoder reads each segment of a text alone and keeps what every layer has at each c-th token. A
decoder has those vectors before its prompt: `E h_0` in place of embeddings, and after layer l

    x[:P] += A_l h_{l+1}

where h_0 is the encoder's embedding and h_{l+1} the output of its layer l. So the decoder's context
holds c times as many tokens as it has places.

Both learn at once to say a text again from an excerpt on, and to go on behind it; after that the
encoder stays, and the decoder learns to read more of its vectors (`apart`).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.models import decoder, default_context
from lcm.models.encoder import layer
from lcm.models.spec import ModelSpec
from lcm.ops.losses import cross_entropy
from lcm.types import Array, Hidden, Logits, Tokens


@dataclasses.dataclass(frozen=True)
class CompressionSpec:
    """Two models, tokens of a segment, and how many of them become one vector: the ratio, c.

    An encoder with a multiple of the decoder's layers gives the mean of each group of them. Not of
    `every` layer, the last one's output alone is kept, and stands in place of embeddings.

    Raises:
        ConfigError: for a ratio that does not divide the segment, or depths that do not.
    """

    encoder: ModelSpec
    decoder: ModelSpec
    segment: int = 2048
    ratio: int = 32
    every: bool = True

    def __post_init__(self) -> None:
        if self.ratio < 1 or self.segment < 1 or self.segment % self.ratio:
            raise ConfigError(
                f"ratio {self.ratio} does not divide segments of {self.segment} tokens: a vector "
                "stands for as many tokens of one segment as any other"
            )
        if self.encoder.depth % self.decoder.depth:
            raise ConfigError(
                f"an encoder of depth {self.encoder.depth} for a decoder of {self.decoder.depth}: "
                "take one of as many layers, or of a multiple"
            )

    def prefix(self, length: int) -> int:
        """Places of the decoder that a text takes, `ceil(n / segment) segment / c`."""
        return -(-length // self.segment) * self.segment // self.ratio


def init(spec: CompressionSpec, key: jax.Array) -> decoder.Params:
    """Fresh parameters of both models and of the maps between them.

    The map to the first layer keeps the size of vectors; the others are 0, as an added branch of
    which a trained decoder should know nothing at first.
    """
    first, second, third = jax.random.split(key, 3)
    read, write = spec.encoder.width, spec.decoder.width
    embed = jax.random.normal(third, (read, write)) * read**-0.5
    depth = spec.decoder.depth if spec.every else 0
    maps = {"embed": embed, "layers": jnp.zeros((depth, read, write))}
    return {
        "encoder": decoder.init(spec.encoder, first),
        "decoder": decoder.init(spec.decoder, second),
        "maps": maps,
    }


def filled(tokens_BN: Tokens, segment: int) -> Tokens:
    """Texts as whole segments: a short one said again until it fills one, a longer one with its own
    last tokens before it. One that has whole segments stays as it is.

    Raises:
        ValueError: for no text, or one without a token.
    """
    if tokens_BN.ndim != 2 or not tokens_BN.size:
        raise ValueError(
            f"texts of shape {tokens_BN.shape} have nothing to compress: give [B, N], one text and "
            "one token or more"
        )
    length = tokens_BN.shape[1]
    if length < segment:
        return jnp.tile(tokens_BN, (1, -(-segment // length)))[:, :segment]
    missing = -length % segment
    before_BM = tokens_BN[:, length - missing :]
    return jnp.concatenate([before_BM, tokens_BN], axis=1) if missing else tokens_BN


def compress(spec: CompressionSpec, params: decoder.Params, tokens_BN: Tokens) -> Array:
    """Vectors of texts, `[B, P, depth + 1, D]`: of the decoder's depth, embeddings first.

    `[B, P, 1, D]` of the last layer alone, where the spec says so.
    """
    tokens_BN = filled(tokens_BN, spec.segment)
    batch, length = tokens_BN.shape
    apart_ML = tokens_BN.reshape(-1, spec.segment)
    every_KMLD = _layers(spec.encoder, params["encoder"], apart_ML, None)[1]
    kept_KMPD = every_KMLD[:, :, spec.ratio - 1 :: spec.ratio]
    vectors_KMPD = _grouped(spec, kept_KMPD) if spec.every else kept_KMPD[-1:]
    vectors_MPKD = jnp.moveaxis(vectors_KMPD, 0, 2)
    return vectors_MPKD.reshape(batch, length // spec.ratio, *vectors_MPKD.shape[2:])


def _grouped(spec: CompressionSpec, kept_KMPD: Array) -> Array:
    """Embeddings, and for each layer of the decoder the mean of its group of the encoder's."""
    group = spec.encoder.depth // spec.decoder.depth
    outputs = kept_KMPD[1:].reshape(spec.decoder.depth, group, *kept_KMPD.shape[1:]).mean(1)
    return jnp.concatenate([kept_KMPD[:1], outputs])


def read(
    spec: CompressionSpec, params: decoder.Params, vectors_BPKD: Array, tokens_BL: Tokens
) -> Logits:
    """float32 logits of a prompt that follows compressed texts, `[B, L, V]`.

    Positions are 0 ... P - 1 for the texts, and go on; attention is causal over both. An encoding
    that adds to embeddings adds to those of the prompt alone: vectors have the encoder's.

    Raises:
        ValueError: for vectors or a prompt of other shapes.
    """
    wanted = len(tokens_BL), spec.decoder.depth + 1 if spec.every else 1, spec.encoder.width
    found = vectors_BPKD.shape
    if tokens_BL.ndim != 2 or not tokens_BL.size or (found[0], *found[2:]) != wanted:
        raise ValueError(
            f"vectors {found} before a prompt {tokens_BL.shape}: give [B, P, {wanted[1]}, "
            f"{wanted[2]}] as compress does, and [B, L] of one row and one token or more"
        )
    x_BLD = _layers(spec.decoder, params["decoder"], tokens_BL, (vectors_BPKD, params["maps"]))[0]
    x_BLD = decoder.final_norm(spec.decoder, params["decoder"], x_BLD[:, vectors_BPKD.shape[1] :])
    return decoder.logits(spec.decoder, params["decoder"], x_BLD)


class Task(NamedTuple):
    """What a decoder is asked for: a share of rows says the text again, the others go on behind it.

    The first begin with an excerpt of `excerpt` (least and most) tokens from a random place, and
    both have `answer` tokens to give. The paper's shares are 0.9 to study what comes through, and
    0.1 for models that follow instructions; its excerpts have 10 to 20 tokens, its answers 512.
    """

    share: float = 0.9
    excerpt: tuple[int, int] = (10, 20)
    answer: int = 512

    @property
    def places(self) -> int:
        """Tokens that the decoder reads behind the prefix."""
        return self.excerpt[1] + self.answer - 1


class Asked(NamedTuple):
    """Texts for the encoder, and what the decoder reads and is to give, with a loss on answers."""

    text_BN: Tokens
    tokens_BL: Tokens
    targets_BL: Tokens
    weight_BL: Array


def ask(task: Task, key: jax.Array, rows_BM: Tokens, length: int) -> Asked:
    """Of rows, their first `length` tokens as the text, and a task for each.

    A text said again: its excerpt weighs nothing, the answer goes on where that ends, in the text.
    One gone on behind: the decoder reads the token that follows it, and gives those after it.

    Raises:
        ConfigError: for a share or an excerpt that there is not, a text without room for excerpt
            and answer, or rows without what follows it.
    """
    (least, most), count, behind = task.excerpt, len(rows_BM), length + task.answer + 1
    if not (0 <= task.share <= 1 and 1 <= least <= most and task.answer >= 1):
        raise ConfigError(
            f"share={task.share}, excerpt={task.excerpt}, answer={task.answer}: take a share from "
            "0 to 1, an excerpt of one token or more, least first, and an answer of one or more"
        )
    if most + task.answer > length or behind > rows_BM.shape[1]:
        raise ConfigError(
            f"texts of {length} in rows of {rows_BM.shape[1]} tokens have no room: take texts of "
            f"{most + task.answer} or more, excerpt and answer, and rows of {behind}"
        )
    which, where, size = jax.random.split(key, 3)
    again_B = jax.random.uniform(which, (count,)) < task.share
    room = length - most - task.answer + 1
    start_B = jnp.where(again_B, jax.random.randint(where, (count,), 0, room), length)
    told_B = jnp.where(again_B, jax.random.randint(size, (count,), least, most + 1), 1)
    at_L = jnp.arange(task.places)
    # What stands behind an answer weighs nothing; of rows gone on it may lie behind the row.
    at_BL = jnp.minimum(start_B[:, None] + at_L, rows_BM.shape[1] - 2)
    weight_BL = (at_L >= told_B[:, None] - 1) & (at_L < told_B[:, None] - 1 + task.answer)
    take = lambda at_BL: jnp.take_along_axis(jnp.asarray(rows_BM), at_BL, 1)  # noqa: E731
    return Asked(rows_BM[:, :length], take(at_BL), take(at_BL + 1), weight_BL.astype(jnp.float32))


def answered(spec: CompressionSpec, params: decoder.Params, asked: Asked) -> tuple[Array, Array]:
    """Negative log-likelihood of each target in nats, and whether it comes first, `[B, L]` both."""
    vectors_BPKD = compress(spec, params, asked.text_BN)
    logits_BLV = read(spec, params, vectors_BPKD, asked.tokens_BL)
    right_BL = logits_BLV.argmax(-1) == asked.targets_BL
    return cross_entropy(logits_BLV, asked.targets_BL)[0], right_BL


def loss(spec: CompressionSpec, params: decoder.Params, asked: Asked) -> Array:
    """The mean over the tokens of answers, in nats."""
    nll_BL, _ = answered(spec, params, asked)
    return (nll_BL * asked.weight_BL).sum() / asked.weight_BL.sum()


def apart(params: decoder.Params, stage: int) -> tuple[Any, Any]:
    """What is trained in a stage and what stays: nothing in the first, the encoder in the second.

    What stays is for no gradient and no optimiser to see, whose decay would move it; the two
    together, `trained | kept`, are the parameters.

    Raises:
        ConfigError: for another stage.
    """
    if stage not in (1, 2):
        raise ConfigError(
            f"stage {stage} is neither 1, of all parameters, nor 2, of those but the encoder's"
        )
    kept = {name: part for name, part in params.items() if stage == 2 and name == "encoder"}
    return {name: part for name, part in params.items() if name not in kept}, kept


def _layers(
    spec: ModelSpec, params: decoder.Params, tokens_BL: Tokens, prefix: tuple | None
) -> tuple[Hidden, Array]:
    """The output of the last layer, before the final norm, and what every layer reads and gives,
    `[depth + 1, B, L, D]`; behind a prefix of vectors with their maps, if there is one."""
    places = 0
    if prefix is not None:
        vectors_BPKD, maps = prefix
        places = vectors_BPKD.shape[1]
        tokens_BL = jnp.pad(tokens_BL, ((0, 0), (places, 0)))
    context = default_context(tokens_BL.shape)
    shared = decoder.prepared(spec, params.get("positions", {}))
    x_BLD = decoder.embedded(spec, params, tokens_BL, context, shared)
    if places:
        first_BPD = (vectors_BPKD[:, :, 0] @ maps["embed"]).astype(x_BLD.dtype)
        x_BLD = x_BLD.at[:, :places].set(first_BPD)
    every = [x_BLD]
    for n in range(spec.depth):
        kind, at = n % len(spec.layers), n // len(spec.layers)
        own = shared.get(decoder.own_encoding(spec, kind), {})
        stacked = params["layers"][str(kind)]
        x_BLD = layer(spec.layers[kind], stacked, at, x_BLD, context, own)
        if places and len(maps["layers"]):
            more_BPD = vectors_BPKD[:, :, n + 1] @ maps["layers"][n]
            x_BLD = x_BLD.at[:, :places].add(more_BPD.astype(x_BLD.dtype))
        every.append(x_BLD)
    return x_BLD, jnp.stack(every)
