"""The recurrences as they are defined, one token after the other."""

import jax
import jax.numpy as jnp

from lcm.types import Array

Erase = tuple[Array, ...]  # (a, b), or (a, b, rate of each head)


def diag_steps(a: Array, b: Array, h0: Array, reset_BL: Array) -> tuple[Array, Array]:
    """`h_t = a_t h_{t-1} + b_t` for `[B, L, ...]`, and the last of them."""

    def step(h: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        a, b, reset_B = xs
        h = a * cleared(h, reset_B) + b
        return h, h

    last, h = jax.lax.scan(step, h0, jax.tree.map(over_time, (a, b, reset_BL)))
    return over_time(h), last


def matrix_steps(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    erase: Erase | None,
    S0: Array,
    reset_BL: Array,
) -> tuple[Array, Array]:
    """`matrix_step` of each token, its outputs and the last state."""

    def step(S: Array, xs: tuple) -> tuple[Array, Array]:
        *token, reset_B = xs
        return matrix_step(cleared(S, reset_B), *token)

    xs = jax.tree.map(over_time, (q, k, v, log_decay, erase, reset_BL))
    last, y = jax.lax.scan(step, S0, xs)
    return over_time(y), last


def matrix_step(
    S_BHNP: Array, q: Array, k: Array, v: Array, log_decay: Array, erase: Erase | None
) -> tuple[Array, Array]:
    """`S = diag(exp(l)) S + b (a^T S) + k v^T` and `y = S^T q`, of one token.

    q, k, and a, b of `erase` are `[B, G, N]`, heads sharing them in groups; v is `[B, H, P]`,
    log_decay `[B, H]` or `[B, H, N]`, and the rate of `erase` `[B, H]`.
    """
    heads = v.shape[1]
    q, k = (by_head(x, heads, 1) for x in (q, k))
    after = decay_of(log_decay, v)[..., None] * S_BHNP + k[..., None] * v[..., None, :]
    if erase:
        a, b = (by_head(x, heads, 1) for x in pair_of(erase, heads, 1))
        after += b[..., None] * (a[..., None] * S_BHNP).sum(-2, keepdims=True)
    return after, (q[..., None] * after).sum(-2)


def decay_of(log_decay: Array, v: Array) -> Array:
    """`exp(l)`, with an axis of N or 1."""
    return jnp.exp(log_decay if log_decay.ndim == v.ndim else log_decay[..., None])


def pair_of(erase: Erase, heads: int, axis: int) -> tuple[Array, Array]:
    """a, and b times the rate if there is one."""
    a, b, *rate = erase
    return (a, rate[0][..., None] * by_head(b, heads, axis)) if rate else (a, b)


def rate_of(erase: Erase, log_decay_BLH: Array) -> Array:
    """The rate, or else 1."""
    return erase[2] if len(erase) > 2 else jnp.ones_like(log_decay_BLH)


def by_head(x: Array, heads: int, axis: int) -> Array:
    """What heads share in groups, for each of them."""
    return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis)


def cleared(state: Array, reset_B: Array) -> Array:
    """The state of rows where a document begins is 0."""
    return jnp.where(reset_B.reshape(-1, *[1] * (state.ndim - 1)), 0, state)


def over_time(x: Array) -> Array:
    """The axis of tokens first, or back behind that of rows."""
    return x.swapaxes(0, 1)
