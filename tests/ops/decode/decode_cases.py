"""Small caches, and attention to them in plain loops: what both backends are tested against."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lcm.ops.attention import (
    LinearBias,
    Mask,
    SoftCap,
    causal,
    chunks,
    compose,
    prefix,
    sinks,
    window,
)
from lcm.ops.attention.decode import Cache

MASKS = {
    "all": (Mask(), lambda q, k: True),
    "causal": (causal(), lambda q, k: k <= q),
    "window": (causal() & window(11), lambda q, k: q - 11 < k <= q),
    "sinks": (causal() & sinks(3), lambda q, k: k <= q and k < 3),
    "beyond": (causal() & ~window(11), lambda q, k: k <= q - 11),
    "far sinks": (causal() & sinks(9) & ~window(11), lambda q, k: k <= q - 11 and k < 9),
    "prefix": (prefix(20), lambda q, k: k <= q or k < 20),
    "chunks": (causal() & chunks(12), lambda q, k: k <= q and k // 12 == q // 12),
}
SLOPES = np.array([0.5, 0.0, 0.125, 1.0, 0.25, 0.03], np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logarithm:
    """`score - (slope_h + [h + i odd]) log(1 + 2 (i - j))`."""

    slopes_H: jax.Array

    def __call__(self, score, q_pos, k_pos, head):
        odd = (head + q_pos) % 2 == 1
        slope = self.slopes_H[head] + jnp.where(odd, 1.0, 0.0)
        return score - slope * jnp.log(1.0 + 2.0 * (q_pos - k_pos).astype(jnp.float32))


MODS = {
    "bias": (
        lambda heads: LinearBias(jnp.asarray(SLOPES[:heads])),
        lambda score, q, k, head: score - SLOPES[head] * (q - k),
    ),
    "capped bias": (
        lambda heads: compose(SoftCap(1.5), LinearBias(jnp.asarray(SLOPES[:heads]))),
        lambda score, q, k, head: 1.5 * np.tanh(score / 1.5) - SLOPES[head] * (q - k),
    ),
    "logarithm": (  # no number at keys after the query; a flag and a table by head and query
        lambda heads: Logarithm(jnp.asarray(SLOPES[:heads])),
        lambda score, q, k, head: score - (SLOPES[head] + (head + q) % 2) * np.log1p(2 * (q - k)),
    ),
}


def documents(lengths, heads, size, seed=0):
    """Keys and values of every token that each row was ever given, `[S, G, K]` a row."""
    rng = np.random.default_rng(seed)
    make = lambda n: rng.normal(size=(n, heads, size)).astype(np.float32)  # noqa: E731
    return [(make(n), make(n)) for n in lengths]


def queries(batch, length, heads, size, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, length, heads, size)).astype(np.float32)


def filled(rows, pages_a_row, page, dtype=jnp.float32, shuffled=True, seed=2):
    """A cache of such rows, by writing token after token; pages in any order, none unused."""
    rng = np.random.default_rng(seed)
    batch, (_, heads, size) = len(rows), rows[0][0].shape
    pages = batch * pages_a_row + 2 * shuffled
    order = rng.permutation(pages) if shuffled else np.arange(pages)
    table = order[: batch * pages_a_row].reshape(batch, pages_a_row)
    held = rng.normal(size=(2, pages, page, heads * size)).astype(np.float32)  # of rows before
    for row, kv in zip(table, rows, strict=True):
        for x_PTM, x_SGK in zip(held, kv, strict=True):
            for p, token in enumerate(x_SGK):
                x_PTM[row[p // page % pages_a_row], p % page] = token.reshape(-1)
    k, v = jnp.asarray(held, dtype)
    lengths = jnp.asarray([len(k) for k, _ in rows], jnp.int32)
    given = jnp.asarray(table, jnp.int32) if shuffled else None
    return Cache(k, v, given, lengths, kv_heads=heads)


def attend(q_BLHK, rows, slots, seen, modify=None, scale=None):
    """Outputs and log-sums of the last L tokens of each row over the last `slots`, in float64."""
    batch, length, heads, size = q_BLHK.shape
    out, lse = np.zeros(q_BLHK.shape), np.full((batch, length, heads), -np.inf)
    for b, (k, v) in enumerate(rows):
        shared = heads // k.shape[1]
        for i in range(length):
            at = len(k) - length + i
            shown = [p for p in range(max(len(k) - slots, 0), len(k)) if at >= 0 and seen(at, p)]
            if not shown:
                continue
            for h in range(heads):
                keys, values = (x[shown, h // shared].astype(np.float64) for x in (k, v))
                score = keys @ q_BLHK[b, i, h].astype(np.float64) * (scale or size**-0.5)
                if modify is not None:
                    score = modify(score, at, np.array(shown), h)
                p = np.exp(score - score.max())
                out[b, i, h] = p @ values / p.sum()
                lse[b, i, h] = score.max() + np.log(p.sum())
    return out, lse


def close(found, expected, tolerance=2e-5):
    for a, b in zip(found, expected, strict=True):
        a = np.asarray(a, np.float32)
        assert not np.isnan(a).any()
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)
