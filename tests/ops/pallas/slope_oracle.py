"""The gradient of ALiBi's slopes in float64, and what bfloat16 leaves uncertain of it.

    dm = - sum_ij ds_ij (i - j),  ds_ij = p_ij (dp_ij - delta_i),  delta_i = sum_j p_ij dp_ij

Backward passes take delta from the output, `sum_c do_c o_c`, whose o is rounded to bfloat16 and
was summed from weights p rounded to bfloat16. With independent errors e, e' of at most u = 2^-8

    delta_i is off by sum_c do_c o_c e_c + sum_j p_ij dp_ij e'_j
    and dm by sum_i of that times sum_j p_ij (i - j)

so the deviation below follows. It is no small part of dm, whose own terms cancel to a thousandth
and less: no sum of ds, however exact, has a better gradient than that.
"""

import jax.numpy as jnp
import numpy as np

from lcm.ops.attention.mask import visible

LOG2E = 1 / np.log(2)
UNIT = 2.0**-8


def rounded_queries(q, scale, modified):
    """Queries as kernels multiply them, which scale them first; in float64."""
    factor = scale if modified else scale * LOG2E
    q = (q.astype(jnp.float32) * factor).astype(q.dtype)
    return np.asarray(q, np.float64) * (1 if modified else 1 / LOG2E)


def gradient(parts, v_BSGK, slopes_H, d_out_BLHK, where, scale):
    """Gradient and deviation for each head; parts are (queries, keys, mask, cap, biased)."""
    shared = len(slopes_H) // v_BSGK.shape[2]
    wide = lambda x: np.repeat(np.asarray(x, np.float64), shared, axis=2)  # noqa: E731
    d_out, v, found = np.asarray(d_out_BLHK, np.float64), wide(v_BSGK), []
    distance = (where.positions_BL[:, :, None] - where.positions_BL[:, None]).astype(float)[:, None]
    biases = []
    for q, k, mask, cap, biased in parts:
        q = rounded_queries(q, scale, biased or cap is not None)
        score = np.einsum("blhk,bshk->bhls", q, wide(k))
        score = score if cap is None else cap * np.tanh(score / cap)
        bias = np.broadcast_to(distance * biased, score.shape)
        score = score - np.asarray(slopes_H, np.float64)[:, None, None] * bias
        seen = np.asarray(visible(mask, where, where))[:, None]
        found.append(np.where(seen, score, -np.inf))
        biases.append(np.where(seen, bias, 0.0))
    score, bias = np.concatenate(found, -1), np.concatenate(biases, -1)
    top = score.max(-1, keepdims=True)
    p = np.exp(score - np.where(np.isfinite(top), top, 0.0))
    total = p.sum(-1, keepdims=True)
    p = p / np.where(total > 0, total, 1.0)
    d_p = np.concatenate([np.einsum("blhk,bshk->bhls", d_out, v)] * len(parts), -1)
    out = np.einsum("bhls,bshk->blhk", p, np.concatenate([v] * len(parts), 1))
    d_score = p * (d_p - (p * d_p).sum(-1, keepdims=True))
    errors = ((d_out * out) ** 2).sum(-1).swapaxes(1, 2) + ((p * d_p) ** 2).sum(-1)
    deviation = UNIT / 3**0.5 * np.sqrt((errors * (p * bias).sum(-1) ** 2).sum((0, 2)))
    return -(d_score * bias).sum((0, 2, 3)), deviation
