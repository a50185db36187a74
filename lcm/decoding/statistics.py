"""Whether draws come from the distribution that they are said to come from.

A test with a known rate of false alarms: it fails below p = 1e-4 with a fixed seed, so that some
hundred of them rarely fail one and none flickers.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from lcm.decoding.processors import entropy
from lcm.types import Array


def chi_square(counts: np.ndarray, probabilities: np.ndarray, least: float = 5.0) -> float:
    """The p-value of observed counts, `[n]` each, under exact probabilities.

    Cells of an expected count under `least` are merged into one. A cell of probability zero must be
    empty; anything in it has p = 0.
    """
    counts, probabilities = np.asarray(counts, np.float64), np.asarray(probabilities, np.float64)
    if counts[probabilities == 0].sum() > 0:
        return 0.0
    expected = counts.sum() * probabilities / probabilities.sum()
    large = expected >= least
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    cells = expected > 0
    deviations = (observed[cells] - expected[cells]) ** 2 / expected[cells]
    return float(stats.chi2.sf(deviations.sum(), cells.sum() - 1))


def moments(logits_RV: Array) -> tuple[Array, Array]:
    """Mean `H` and variance `sum P log^2 P - H^2` of a draw's surprise `-log P(x)`, `[R]` each.

    Take the logits that the token was drawn from, after every truncation.
    """
    logp_RV = jax.nn.log_softmax(logits_RV, axis=1)
    entropy_R = entropy(logp_RV)
    possible_RV = logp_RV > -jnp.inf
    away_RV = jnp.where(possible_RV, logp_RV + entropy_R[:, None], 0)
    return entropy_R, jnp.sum(jnp.exp(logp_RV) * away_RV**2, axis=1)


def entropy_z(logprobs: np.ndarray, entropies: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """`sum(-log P_t(x_t) - H_t) / sqrt(sum Var_t)` over the last axis: standard normal if right.

    The terms are martingale differences, so that sequences need no enumeration. Too cold a sampler
    gives negative values, too hot a one positive.
    """
    surprise = np.sum(-np.asarray(logprobs, np.float64) - entropies, axis=-1)
    return surprise / np.sqrt(np.sum(np.asarray(variances, np.float64), axis=-1))
