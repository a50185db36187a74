"""What an encoding does to attention, read from its outputs alone: decay, and position maps.

Values that are rows of the identity make the output of attention its weights, whose logarithm is
the score up to a constant of the query. So any encoding can be drawn, whether it rotates, adds,
masks or chooses keys.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcm.ops import attention
from lcm.ops.attention import Part
from lcm.positions import Dims, PositionEncoding, Remap
from lcm.types import Context


class Probe(NamedTuple):
    """scores: `[H, n]` of the last query by key, relative to that with itself; -inf if not seen.

    rho: `[n, n]`, the distance at which query i sees key j by the slowest pair, NaN if not seen.
    """

    scores: np.ndarray
    rho: np.ndarray


def probe(encoding: PositionEncoding, dims: Dims, length: int, seed: int = 0) -> Probe:
    """Attention of one document with queries and keys of ones, and with those of one pair.

    The pair gives cosine and sine of its angle, and with its frequency the distance.
    """
    params = encoding.prepare(_parameters(encoding, dims, jax.random.key(seed)))
    theta = _slowest(encoding, dims, length)
    run = jax.jit(lambda q, k: jnp.log(_weights(encoding, params, q, k, context(length, len(q)))))
    score, cos, sin = np.asarray(run(*_queries_and_keys(dims, length)))

    own = np.arange(length)
    with np.errstate(invalid="ignore"):
        score, cos, sin = (x - x[:, own, own][:, :, None] for x in (score, cos, sin))
        amplitude = STRENGTH**2 / dims.head_size**0.5
        angle = np.arctan2(sin[0] / amplitude, cos[0] / amplitude + 1)
    return Probe(score[:, -1], np.where(np.isfinite(sin[0]), angle / theta, np.nan))


STRENGTH = 8.0  # of the pair that is turned: float32 weights tell angles of 1e-7 apart


def context(length: int, batch: int = 1) -> Context:
    """One document a row, counted down as one whose length is controlled, of growing intervals."""
    places = jnp.tile(jnp.arange(length, dtype=jnp.int32), (batch, 1))
    tau = places.astype(jnp.float32)
    return Context(places, jnp.ones_like(places), places[:, ::-1], interval_BL=tau)


def added(encoding: PositionEncoding, dims: Dims, length: int, seed: int = 0) -> np.ndarray | None:
    """`[n]` cosines of what joins the last place and the others, where it joins embeddings."""
    params = _parameters(encoding, dims, jax.random.key(seed))
    nothing = jnp.zeros((1, length, dims.width))
    for join in (encoding.embed, encoding.infuse):
        x_LD = np.asarray(join(params, nothing, context(length))[0], np.float64)
        if np.any(x_LD):
            unit = x_LD / np.linalg.norm(x_LD, axis=-1, keepdims=True)
            return unit @ unit[-1]
    return None


def _parameters(encoding: PositionEncoding, dims: Dims, key: jax.Array) -> dict[str, Any]:
    shared, own = jax.random.split(key)
    return {**encoding.init(shared, dims), **encoding.init_layer(own, dims)}


def _slowest(encoding: PositionEncoding, dims: Dims, length: int) -> float:
    """The frequency of the slowest pair of the RoPE that an encoding maps distances for."""
    if not isinstance(encoding, Remap):
        return np.nan
    theta, _ = encoding.rope.frequencies(dims.head_size, jnp.asarray(length))
    return float(theta[-1])


def _queries_and_keys(dims: Dims, length: int) -> tuple[jax.Array, jax.Array]:
    """Of ones; of the slowest pair, in phase; and with keys a quarter of a turn ahead."""
    shape = length, dims.heads, dims.head_size
    zero, ones = jnp.zeros(shape), jnp.ones(shape)
    cos, sin = (zero.at[..., n - 1].set(STRENGTH) for n in (dims.head_size // 2, dims.head_size))
    return jnp.stack([ones, cos, cos]), jnp.stack([ones, cos, sin])


def _weights(encoding: PositionEncoding, params: Any, q: Any, k: Any, where: Context) -> jax.Array:
    """`[B, H, L, S]`, from as many values of the identity at a time as a head holds."""
    length, size = q.shape[1], q.shape[3]
    keys = encoding.keys(params, k, where)
    blocks = jnp.pad(jnp.eye(length), ((0, 0), (0, -length % size)))
    blocks = jnp.moveaxis(blocks.reshape(length, -1, size), 1, 0)

    def block(columns: jax.Array) -> jax.Array:
        v = jnp.broadcast_to(columns[None, :, None], k.shape)
        out = encoding.attend(params, q, keys, v, where, where, limit=_causal, backend="reference")
        return out.transpose(0, 2, 1, 3)

    found = jnp.moveaxis(jax.lax.map(block, blocks), 0, 3)
    return found.reshape(*found.shape[:3], -1)[..., :length]


def _causal(part: Part) -> Part:
    return Part(
        part.q_BLHK, part.k_BSGK, part.mask & attention.causal(), part.score_mod, part.blocks
    )
