"""Heads whose slow rotary pairs carry what they read from afar (arXiv:2410.08703).

The paper's metric is not published in full; this is one that fits its description.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy import stats

from lcm import models
from lcm.errors import ConfigError
from lcm.evaluation.attention import weights
from lcm.ops.attention import Part
from lcm.positions import PositionEncoding, RoPE
from lcm.types import Array, Context, Tokens

SINKS = 4  # first keys that do not count as far: they draw attention whatever they hold


class PositionalHeads(NamedTuple):
    """Of each head, `[layers, H]` and `[layers, H, R/2]`.

    score: rank correlation of a pair's index with its contribution to far attention, -1 to 1.
    allocation: share of the slower half of pairs in all contributions; nan where there are none.
    far: contributions, how much more a pair adds to scores of far keys that are attended to than to
        those of all keys.
    """

    score: np.ndarray
    allocation: np.ndarray
    far: np.ndarray

    def top(self, share: float = 0.05) -> list[tuple[int, int]]:
        """(layer, head) of the highest scores, a share of all, at least one; best first."""
        count = max(1, round(share * self.score.size))
        order = np.argsort(-self.score, axis=None, kind="stable")[:count]
        return [tuple(map(int, np.unravel_index(n, self.score.shape))) for n in order]


def positional_heads(
    cfg: Any, params: Any, tokens_BL: Tokens, distance: int = 0
) -> PositionalHeads:
    """Scores of all heads of a model with rotary positions, on rows of tokens.

    With pairs i of queries m and keys n, after rotation, c_i(m, n) = q_i . k_i, and weights a:

        far_i = mean_m [ sum_{m - n >= D} a c_i / sum_{m - n >= D} a  -  mean_n c_i ]
        score = Spearman(i, far_i),   allocation = sum_{i >= R/4} |far_i| / sum_i |far_i|

    distance: D; 0 takes half of the length. Queries with no far key are left out.

    Raises:
        ConfigError: if a layer's encoding does not rotate, or attends in several parts.
    """
    length = tokens_BL.shape[1]
    layers = models.spec(cfg).layers
    ropes = [_rope(layer.positions) for layer in layers]
    measure = _measure(ropes[0].rotated(layers[0].dims.head_size), distance or length // 2)
    far = np.asarray(models.probe(cfg, params, tokens_BL, measure), np.float64)
    pairs = far.shape[-1]
    scores = np.apply_along_axis(_rises, -1, far)
    slow, whole = np.abs(far)[..., pairs // 2 :].sum(-1), np.abs(far).sum(-1)
    share = np.divide(slow, whole, out=np.full_like(whole, np.nan), where=whole > 0)
    return PositionalHeads(scores, share, far)


def _rises(x: np.ndarray) -> float:
    """Rank correlation with the index; 0 for equal values, which have no order."""
    return stats.spearmanr(np.arange(len(x)), x).statistic if np.ptp(x) else 0.0


@functools.cache
def _measure(rotated: int, distance: int) -> Any:
    return functools.partial(far_contributions, rotated=rotated, distance=distance)


def far_contributions(
    parts: tuple[Part, ...], context: Context, *, rotated: int, distance: int
) -> Array:
    """far_i of every head, `[H, R/2]`, mean over rows and queries that see a far key."""
    (part,) = parts
    q, k = (x.astype(jnp.float32) for x in (part.q_BLHK, part.k_BSGK))
    heads, length = q.shape[2], q.shape[1]
    k = jnp.repeat(k, heads // k.shape[2], axis=2)
    where = context.positions_BL
    apart = where[:, :, None] - where[:, None]
    seen = part.sees(context, context, jnp.arange(length))
    far = seen & (apart >= distance)[:, None] & (where >= SINKS)[:, None, None]
    a = jnp.where(far, weights(parts, context), 0.0)
    total = a.sum(-1, keepdims=True)
    near = (seen / seen.sum(-1, keepdims=True)).astype(jnp.float32)
    near = jnp.broadcast_to(near, a.shape)
    by_far, by_all = (
        _products(q, jnp.einsum("bhls,bshk->blhk", w, k), rotated)
        for w in (a / jnp.where(total > 0, total, 1.0), near)
    )
    some = (far.any(-1) & (total[..., 0] > 0)).transpose(0, 2, 1)[..., None]
    return jnp.where(some, by_far - by_all, 0.0).sum((0, 1)) / jnp.maximum(some.sum((0, 1)), 1)


def _products(q: Array, k: Array, rotated: int) -> Array:
    """q . k by pair, `[B, L, H, R/2]`."""
    product = (q * k)[..., :rotated]
    return product[..., : rotated // 2] + product[..., rotated // 2 :]


def without_heads(cfg: Any, params: Any, heads: list[tuple[int, int]]) -> Any:
    """Parameters with the output of some (layer, head) set to 0."""
    spec, changed = models.spec(cfg), dict(params["layers"])
    for layer, head in heads:
        kind, at = str(layer % len(spec.layers)), layer // len(spec.layers)
        mixer = changed[kind]["mixer"]
        size = mixer["out"].shape[1] // spec.layers[int(kind)].heads
        out = jnp.asarray(mixer["out"]).at[at, head * size : (head + 1) * size].set(0)
        changed[kind] = {**changed[kind], "mixer": {**mixer, "out": out}}
    return {**params, "layers": changed}


def _rope(encoding: PositionEncoding) -> RoPE:
    """The rotation of an encoding, joined by others or not."""
    encoding = encoding.attending
    if not isinstance(encoding, RoPE):
        raise ConfigError(
            f"{type(encoding).__name__} does not rotate queries and keys in one part: positional "
            "heads are defined for rope and its scalings"
        )
    return encoding
