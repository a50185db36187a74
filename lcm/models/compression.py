"""Recurrent Context Compression (2024, arXiv:2406.06110): what is long, read as a short prefix.

An encoder reads each segment of a text alone and keeps what every layer has at each c-th token. A
decoder has those vectors before its prompt: `E h_0` in place of embeddings, and after layer l

    x[:P] += A_l h_{l+1}

where h_0 is the encoder's embedding and h_{l+1} the output of its layer l. So the decoder's context
holds c times as many tokens as it has places.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lcm.errors import ConfigError
from lcm.models import decoder, default_context
from lcm.models.encoder import layer
from lcm.models.spec import ModelSpec
from lcm.types import Array, Hidden, Logits, Tokens


@dataclasses.dataclass(frozen=True)
class CompressionSpec:
    """Two models, tokens of a segment, and how many of them become one vector: the ratio, c.

    An encoder with a multiple of the decoder's layers gives the mean of each group of them.

    Raises:
        ConfigError: for a ratio that does not divide the segment, or depths that do not.
    """

    encoder: ModelSpec
    decoder: ModelSpec
    segment: int = 2048
    ratio: int = 32

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
    maps = {"embed": embed, "layers": jnp.zeros((spec.decoder.depth, read, write))}
    return {
        "encoder": decoder.init(spec.encoder, first),
        "decoder": decoder.init(spec.decoder, second),
        "maps": maps,
    }


def filled(tokens_BN: Tokens, segment: int) -> Tokens:
    """Texts as whole segments: a short one said again until it fills one, a longer one with its own
    last tokens before it. One that has whole segments stays as it is.

    Raises:
        ValueError: for a text without a token.
    """
    length = tokens_BN.shape[1]
    if not length:
        raise ValueError("a text of 0 tokens has nothing to compress: give one token or more")
    if length < segment:
        return jnp.tile(tokens_BN, (1, -(-segment // length)))[:, :segment]
    missing = -length % segment
    before_BM = tokens_BN[:, length - missing :]
    return jnp.concatenate([before_BM, tokens_BN], axis=1) if missing else tokens_BN


def compress(spec: CompressionSpec, params: decoder.Params, tokens_BN: Tokens) -> Array:
    """Vectors of texts, `[B, P, depth + 1, D]`: of the decoder's depth, embeddings first."""
    tokens_BN = filled(tokens_BN, spec.segment)
    batch, length = tokens_BN.shape
    apart_ML = tokens_BN.reshape(-1, spec.segment)
    every_KMLD = _layers(spec.encoder, params["encoder"], apart_ML, None)[1]
    kept_KMPD = every_KMLD[:, :, spec.ratio - 1 :: spec.ratio]
    group = spec.encoder.depth // spec.decoder.depth
    outputs = kept_KMPD[1:].reshape(spec.decoder.depth, group, *kept_KMPD.shape[1:]).mean(1)
    vectors_KMPD = jnp.concatenate([kept_KMPD[:1], outputs])
    vectors_MPKD = jnp.moveaxis(vectors_KMPD, 0, 2)
    return vectors_MPKD.reshape(batch, length // spec.ratio, spec.decoder.depth + 1, -1)


def read(
    spec: CompressionSpec, params: decoder.Params, vectors_BPKD: Array, tokens_BL: Tokens
) -> Logits:
    """float32 logits of a prompt that follows compressed texts, `[B, L, V]`.

    Positions are 0 ... P - 1 for the texts, and go on; attention is causal over both. An encoding
    that adds to embeddings adds to those of the prompt alone: vectors have the encoder's.
    """
    x_BLD = _layers(spec.decoder, params["decoder"], tokens_BL, (vectors_BPKD, params["maps"]))[0]
    x_BLD = decoder.final_norm(spec.decoder, params["decoder"], x_BLD[:, vectors_BPKD.shape[1] :])
    return decoder.logits(spec.decoder, params["decoder"], x_BLD)


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
        if places:
            more_BPD = vectors_BPKD[:, :, n + 1] @ maps["layers"][n]
            x_BLD = x_BLD.at[:, :places].add(more_BPD.astype(x_BLD.dtype))
        every.append(x_BLD)
    return x_BLD, jnp.stack(every)
