"""Attention in plain loops over batch, heads and queries, in float64 NumPy."""

from collections.abc import Callable, Sequence

import numpy as np

Visible = Callable[[int, int], bool]
Bias = Callable[[np.ndarray, int, np.ndarray, int], np.ndarray]


def attend(
    parts: Sequence[tuple[np.ndarray, np.ndarray, Visible]],
    v_BSGK: np.ndarray,
    q_where: tuple[np.ndarray, np.ndarray],
    k_where: tuple[np.ndarray, np.ndarray],
    modify: Bias = lambda score, q_pos, k_pos, head: score,
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and log-sums; parts are (queries, keys, visible(q, k) of positions).

    `q_where` and `k_where` are (positions, segments).
    """
    batch, length, heads, size = parts[0][0].shape
    shared = heads // v_BSGK.shape[2]
    out = np.zeros((batch, length, heads, v_BSGK.shape[3]))
    lse = np.full((batch, length, heads), -np.inf)
    for b in range(batch):
        for i in range(length):
            q_pos, q_seg = q_where[0][b, i], q_where[1][b, i]
            k_pos, k_seg = k_where[0][b], k_where[1][b]
            for h in range(heads):
                weights, values = [], []
                for q, k, visible in parts:
                    shown = [visible(q_pos, p) for p in k_pos] & (k_seg == q_seg) & (k_seg > 0)
                    at = np.flatnonzero(shown)
                    keys = k[b, at, h // shared].astype(np.float64)
                    score = keys @ q[b, i, h].astype(np.float64) / size**0.5
                    weights.append(modify(score, q_pos, k_pos[at], h))
                    values.append(v_BSGK[b, at, h // shared].astype(np.float64))
                score, value = np.concatenate(weights), np.concatenate(values)
                if len(score):
                    p = np.exp(score - score.max())
                    out[b, i, h] = p @ value / p.sum()
                    lse[b, i, h] = score.max() + np.log(p.sum())
    return out, lse
