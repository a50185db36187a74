"""Distances at which queries see keys: as an encoding's regions have them, and as papers do."""

import jax.numpy as jnp
import numpy as np


def of_regions(encoding, n):
    """rho(i, j), NaN where query i does not see key j; no pair may lie in two regions."""
    places = jnp.arange(n)
    rho = np.full((n, n), np.nan)
    for region in encoding.regions(places, places):
        seen = np.asarray(region.mask.shows(places[:, None], places[None, :]))
        assert np.all(np.isnan(rho[seen]))
        distance = np.asarray(region.q_pos, np.float64)[:, None] - np.asarray(region.k_pos)
        rho[seen] = distance[seen]
    return rho


def _rerope(e, i, j):
    return min(i - j, e.window)


def _leaky(e, i, j):
    d = i - j
    return d if d < e.window else e.window + (d - e.window) / e.k


def _self_extend(e, i, j):
    grouped = i // e.group - j // e.group + e.window - e.window // e.group
    return i - j if i - j < e.window else grouped


def _dual_chunk(e, i, j):
    u, v, behind = i % e.chunk, j % e.chunk, i // e.chunk - j // e.chunk
    last = e.chunk + e.local - 1
    return [u - v, min(e.chunk + u, last) - v, last - v][min(behind, 2)]


def _lm_infinite(e, i, j):
    return min(i - j, e.cap) if i - j < e.window or j < e.sinks else None


def _streaming(e, i, j):
    """Indices in a cache that has evicted all but the sinks and the latest."""
    kept = [t for t in range(i + 1) if t < e.sinks or t > i - (e.kept - e.sinks)]
    return kept.index(i) - kept.index(j) if j in kept else None


PAPERS = {
    "ReRoPE": _rerope,
    "LeakyReRoPE": _leaky,
    "SelfExtend": _self_extend,
    "DualChunk": _dual_chunk,
    "LMInfinite": _lm_infinite,
    "StreamingLLM": _streaming,
}


def of_paper(encoding, n):
    """rho(i, j) pair by pair from the formulas, NaN where query i does not see key j."""
    rho = np.full((n, n), np.nan)
    for i in range(n):
        for j in range(i + 1):
            distance = PAPERS[type(encoding).__name__](encoding, i, j)
            rho[i, j] = np.nan if distance is None else distance
    return rho
