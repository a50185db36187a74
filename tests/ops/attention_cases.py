"""Small attentions that several tests share: arrays, packed rows, masks beside their conditions."""

import jax
import jax.numpy as jnp
import numpy as np

from lcm.ops.attention import BACKENDS, Mask, blockwise, causal, chunks, prefix, sinks, window
from lcm.types import Context

ON_CPU = sorted(name for name, backend in BACKENDS.items() if "cpu" in backend.platforms)

MASKS = {
    "all": (Mask(), lambda q, k: True),
    "causal": (causal(), lambda q, k: k <= q),
    "window": (causal() & window(5), lambda q, k: q - 5 < k <= q),
    "sinks": (causal() & sinks(3), lambda q, k: k <= q and k < 3),
    "beyond": (causal() & ~window(5), lambda q, k: k <= q - 5),
    "prefix": (prefix(4), lambda q, k: k <= q or k < 4),
    "chunks": (causal() & chunks(6), lambda q, k: k <= q and k // 6 == q // 6),
}


def small_blocks(monkeypatch, looped=False):
    """Blocks small enough that rows of 37 have several and the last is not full."""
    monkeypatch.setattr(blockwise, "SHORT", 0 if looped else 1024)
    monkeypatch.setattr(blockwise, "SMALL", 16)
    monkeypatch.setattr(blockwise, "QUERIES", 16)
    monkeypatch.setattr(blockwise, "KEYS", 16)


def arrays(length=21, slots=21, heads=4, kv_heads=2, size=16, batch=2, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [
        (batch, n, h, size) for n, h in ((length, heads), (slots, kv_heads), (slots, kv_heads))
    ]
    return tuple(jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True))


def context(segments_BL, starts=0):
    """Positions that start anew in every segment, as packing makes them."""
    segments_BL = np.asarray(segments_BL, np.int32)
    positions = np.zeros_like(segments_BL)
    for row, segments in zip(positions, segments_BL, strict=True):
        for segment in np.unique(segments):
            row[segments == segment] = starts + np.arange((segments == segment).sum())
    return Context(positions, segments_BL, np.full_like(positions, -1))


def packed(length):
    """Two rows: three documents and padding; one document and padding."""
    a = [1] * (length // 3) + [2] * 2 + [3] * (length // 3)
    b = [1] * (length - 2)
    return context([row + [0] * (length - len(row)) for row in (a, b)])


def assert_gradients_equal(found, expected, tolerance=1e-5):
    """Equal to a tolerance relative to each array's largest entry, and finite."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()), rtol=0)
