"""The decayed and erasing recurrence of a matrix, by products of matrices within chunks.

    S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T        y_t = S_t^T q_t,   w = exp(l)

For a chunk that S enters, with G the inclusive and E = G - l the exclusive sum of l in it, u_i =
a_i^T S_{i-1} and strictly lower or lower C x C matrices A_xy[i, j] = sum_n x_in y_jn exp(X_in -
G_jn), X being E for x = a and G for x = q:

    (I - A_ab) U = (a exp(E)) S + A_ak V
    Y  = (q exp(G)) S + A_qk V + A_qb U
    S' = exp(G_C) S + (k exp(G_C - G))^T V + (b exp(G_C - G))^T U

Without a and b, U is nothing: gated linear attention (arXiv:2312.06635), and with one decay for all
channels SSD (arXiv:2405.21060); with them the delta rule (arXiv:2406.06484). What layers give:

    layer            q            k        v      l                   a            b
    RetNet           q / sqrt N   k        v      log gamma           -            -
    GLA              q / sqrt N   k        v      by channel          -            -
    Mamba-2          C            B        dt x   dt A                -            -
    DeltaNet         q / sqrt N   beta k   v      0                   k            -beta k
    Gated DeltaNet   q / sqrt N   beta k   v      g                   k            -beta exp(g) k
    KDA              q / sqrt N   beta k   v      g, by channel       exp(g) k     -beta k
    RWKV-7           r            k        v      w, by channel       -kappa       kappa * rate

What b has as a factor for each head may be given beside it, as its rate: of the delta rule a and b
then are k, as narrow and as shared as it is.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcm.ops.recurrence import pallas
from lcm.ops.recurrence.inverse import inverse
from lcm.ops.recurrence.pieces import chunk_of, in_chunks
from lcm.ops.recurrence.reference import (
    Erase,
    by_head,
    cleared,
    matrix_step,
    pair_of,
    rate_of,
)
from lcm.types import Array

ON_CPU, CHUNK = 32, 256  # tokens at a time where none are given
SUBCHUNK = 16  # tokens whose decays by channel are multiplied out


def op_matrix(
    q_BLGN: Array,
    k_BLGN: Array,
    v_BLHP: Array,
    log_decay: Array,
    erase: Erase | None = None,
    S0_BHNP: Array | None = None,
    reset_BL: Array | None = None,
    *,
    chunk: int = 0,
) -> tuple[Array, Array]:
    """The outputs `y` `[B, L, H, P]` in the dtype of `v`, and the last state `[B, H, N, P]`.

    q, k, erase: `[B, L, G, N]`; H / G heads in a row share them. `erase` is (a, b), or (a, b, rate)
        with the rates `[B, L, H]` of heads, by which b is multiplied, or None.
    log_decay: l, finite and at most 0, of a head `[B, L, H]`, or of its channels `[B, L, H, N]`.
    S0: the state before, 0 by default.
    reset_BL: bool, where a document begins.
    chunk: tokens that are multiplied at once; 0 chooses by the device, on a TPU a kernel. The
        backward pass keeps the arguments and one state of each chunk.

    Sums are float32, and so are states and decays whatever the dtype of the rest.

    Raises:
        ValueError: for heads that do not share evenly, or shapes that do not fit.
    """
    check(q_BLGN, k_BLGN, v_BLHP, log_decay, erase, S0_BHNP)
    in_kernel = chunk == 0
    chunk = chunk_of(chunk, ON_CPU, CHUNK)
    batch, length, heads, width = v_BLHP.shape
    by_channel = log_decay.ndim == 4
    wide = log_decay.astype(jnp.float32)
    if S0_BHNP is None:
        S0_BHNP = jnp.zeros((batch, heads, q_BLGN.shape[-1], width), jnp.float32)
    if reset_BL is None:
        reset_BL = jnp.zeros((batch, length), bool)
    S0_BHNP = S0_BHNP.astype(jnp.float32)
    if length == 1:
        given = q_BLGN, k_BLGN, v_BLHP, wide, erase
        token = jax.tree.map(lambda x: x[:, 0].astype(jnp.float32), given)
        S_BHNP, y_BHP = matrix_step(cleared(S0_BHNP, reset_BL[:, 0]), *token)
        return y_BHP[:, None].astype(v_BLHP.dtype), S_BHNP

    pair = pair_of(erase, heads, 2) if erase else ()
    rated = erase and not by_channel  # kernels take a rate beside b where decays are of heads
    shared = q_BLGN, k_BLGN, *(erase[:2] if rated else pair)
    if in_kernel and pallas.matrix_fits(shared, v_BLHP, wide):
        of_heads = (wide, rate_of(erase, wide)) if rated else (wide,)
        return pallas.matrix(shared, v_BLHP, of_heads, S0_BHNP, reset_BL)

    shared = q_BLGN, k_BLGN, *pair
    groups = heads if by_channel else max(x.shape[2] for x in shared)
    q, k, *erase = (by_head(x, groups, 2) for x in shared)
    each = heads // groups
    v = v_BLHP.reshape(batch, length, groups, each, width)
    wide = wide if by_channel else wide.reshape(batch, length, groups, each)
    S0 = S0_BHNP.reshape(batch, groups, each, *S0_BHNP.shape[2:])
    moving = reset_BL, q, k, v, wide, tuple(erase)
    multiple = SUBCHUNK if by_channel else 1
    y, S = in_chunks(_CHUNKS[by_channel], chunk, moving, None, S0, multiple=multiple)
    return y.reshape(v_BLHP.shape), S.reshape(S0_BHNP.shape)


def check(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    erase: Erase | None,
    S0: Array | None,
) -> None:
    """Raises a ValueError for shapes that do not fit each other."""
    rows, heads, (states, width) = v.shape[:2], v.shape[2], (q.shape[-1], v.shape[-1])
    for name, x in zip(("q", "k", "a", "b"), (q, k, *(erase or ())), strict=False):
        if (*x.shape[:2], x.shape[-1]) != (*rows, states) or heads % x.shape[2]:
            raise ValueError(
                f"{name} {x.shape} does not fit v {v.shape} and q {q.shape}: give [B, L, G, N], "
                f"with a G that divides H={heads}"
            )
    if log_decay.shape not in ((*rows, heads), (*rows, heads, states)):
        raise ValueError(
            f"log_decay {log_decay.shape} is neither by head {(*rows, heads)} nor by channel "
            f"{(*rows, heads, states)}"
        )
    for rate in (erase or ())[2:]:
        if rate.shape != (*rows, heads):
            raise ValueError(f"the rate {rate.shape} is not by head: give {(*rows, heads)}")
    wanted = rows[0], heads, states, width
    if S0 is not None and S0.shape != wanted:
        raise ValueError(f"S0 {S0.shape} is a state of another layer: this one has {wanted}")


class _Spans(NamedTuple):
    """Sums of log-decays over parts of a chunk, -inf for what a document's beginning cuts off.

    Axes are `[B, G, R, C]` of decays by head, R heads of a group, and `[B, G, C, N]` by channel.
    """

    after: Array  # from behind a token to the end
    entry: Array  # from the beginning through a token, where the state is seen
    entry_before: Array  # from the beginning up to but without it
    whole: Array  # of the chunk, `[B, G, R, 1]` or `[B, G, 1, N]`
    inclusive: Array  # G
    exclusive: Array  # E
    same_BCC: Array  # whether a token and another are of one document


def _chunk(how: type, S: Array, _: None, xs: tuple) -> tuple[Array, Array]:
    """The state `[B, G, R, N, P]` after one chunk, and its outputs `[B, C, G, R, P]`."""
    reset_BC, q, k, v, log_decay, erase = xs
    q, k, erase = jax.tree.map(lambda x: x.swapaxes(1, 2), (q, k, erase))  # [B, G, C, N]
    v_BGRCP = v.transpose(0, 2, 3, 1, 4)
    spans = how.spans(log_decay, jnp.cumsum(reset_BC, 1))
    y = how.read(q, spans.entry, S) + _within(how.scores(q, k, spans), v_BGRCP)
    after = how.kept(S, spans) + how.write(k, spans.after, v_BGRCP)
    if erase:
        a, b = erase
        found = how.read(a, spans.entry_before, S)
        found += _within(how.scores(a, k, spans, strict=True), v_BGRCP)
        u_BGRCP = _within(inverse(how.scores(a, b, spans, strict=True)), found)
        y += _within(how.scores(q, b, spans), u_BGRCP)
        after += how.write(b, spans.after, u_BGRCP)
    return after, y.transpose(0, 3, 1, 2, 4).astype(v.dtype)


class _ByHead:
    """One decay for all channels of a head: it scales scores and values, heads share q and k."""

    @staticmethod
    def spans(log_decay_BCGR: Array, document_BC: Array) -> _Spans:
        return _spans(log_decay_BCGR.transpose(0, 2, 3, 1), document_BC[:, None, None], 3)

    @staticmethod
    def scores(x: Array, y: Array, spans: _Spans, strict: bool = False) -> Array:
        """A_xy, `[B, G, R, C, C]`."""
        start = spans.exclusive if strict else spans.inclusive
        span = start[..., :, None] - spans.inclusive[..., None, :]
        seen = _lower(spans, strict)[:, None, None]
        product_BGCC = _dot("bgcn,bgdn->bgcd", x, y)
        return product_BGCC[:, :, None] * jnp.exp(jnp.where(seen, span, -jnp.inf))

    @staticmethod
    def read(x: Array, span: Array, S: Array) -> Array:
        return _dot("bgcn,bgrnp->bgrcp", x, S) * jnp.exp(span)[..., None]

    @staticmethod
    def write(y: Array, span: Array, u: Array) -> Array:
        return _dot("bgcn,bgrcp->bgrnp", y, u * jnp.exp(span)[..., None])

    @staticmethod
    def kept(S: Array, spans: _Spans) -> Array:
        return jnp.exp(spans.whole)[..., None] * S


class _ByChannel:
    """A decay for each channel of a head: it scales q and k; R is 1."""

    @staticmethod
    def spans(log_decay_BCGN: Array, document_BC: Array) -> _Spans:
        return _spans(log_decay_BCGN.swapaxes(1, 2), document_BC[:, None, :, None], 2)

    @staticmethod
    def scores(x: Array, y: Array, spans: _Spans, strict: bool = False) -> Array:
        """A_xy, `[B, G, 1, C, C]`.

        `exp(X) exp(-G)` overflows, so chunks have parts: of keys in parts before that of a query
        both decays are taken to and from the beginning of its part, and within a part each pair
        has its own.
        """
        *outer, size, states = x.shape
        parts = size // SUBCHUNK
        split = (*outer, parts, SUBCHUNK, states)
        start = spans.exclusive if strict else spans.inclusive
        X, G, x_own, y_own = (z.reshape(split) for z in (start, spans.inclusive, x, y))
        begin = spans.exclusive.reshape(split)[..., :1, :]

        to_begin = jnp.minimum(begin - spans.inclusive[..., None, :, :], 0)  # [B, G, M, C, N]
        x_far, y_far = x_own * jnp.exp(X - begin), y[..., None, :, :] * jnp.exp(to_begin)
        far = _dot("bgmtn,bgmcn->bgmtc", x_far, y_far).reshape(*outer, parts, SUBCHUNK, parts, -1)

        near = _near(strict, x_own, y_own, X, G)[..., None, :]
        own = jnp.eye(parts, dtype=bool)[:, None, :, None]
        scores = jnp.where(own, near, far).reshape(*outer, size, size)
        return jnp.where(_lower(spans, strict)[:, None], scores, 0)[:, :, None]

    @staticmethod
    def read(x: Array, span: Array, S: Array) -> Array:
        return _dot("bgcn,bgrnp->bgrcp", x * jnp.exp(span), S)

    @staticmethod
    def write(y: Array, span: Array, u: Array) -> Array:
        return _dot("bgcn,bgrcp->bgrnp", y * jnp.exp(span), u)

    @staticmethod
    def kept(S: Array, spans: _Spans) -> Array:
        return jnp.exp(spans.whole).swapaxes(2, 3)[:, :, None] * S


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _near(strict: bool, x: Array, y: Array, X: Array, G: Array) -> Array:
    """`sum_n x_tn y_cn exp(X_tn - G_cn)` of pairs within parts of a chunk, `[B, G, M, T, T]`.

    Its gradients are sums over c and over t, the second of pairs the other way round: over an axis
    in the middle of `[T, T, N]` it takes a CPU half of the time of all. Those of X and G follow.
    """
    return _dot("bgmtn,bgmtcn->bgmtc", x, y[..., None, :, :] * _decays(strict, X, G))


def _decays(strict: bool, X: Array, G: Array) -> Array:
    """`exp(X_tn - G_cn)` where t sees c, `[B, G, M, T, T, N]`."""
    lower = jnp.tril(jnp.ones((SUBCHUNK, SUBCHUNK), bool), -int(strict))[..., None]
    return jnp.exp(jnp.where(lower, X[..., :, None, :] - G[..., None, :, :], -jnp.inf))


def _near_forward(strict: bool, *given: Array) -> tuple[Array, tuple[Array, ...]]:
    return _near(strict, *given), given


def _near_backward(strict: bool, given: tuple[Array, ...], d: Array) -> tuple[Array, ...]:
    x, y, X, G = given
    upper = jnp.triu(jnp.ones((SUBCHUNK, SUBCHUNK), bool), int(strict))[..., None]
    turned = jnp.exp(jnp.where(upper, X[..., None, :, :] - G[..., :, None, :], -jnp.inf))
    d_x = _dot("bgmtc,bgmtcn->bgmtn", d, y[..., None, :, :] * _decays(strict, X, G))
    d_y = _dot("bgmtc,bgmctn->bgmcn", d, x[..., None, :, :] * turned)
    return d_x.astype(x.dtype), d_y.astype(y.dtype), x * d_x, -y * d_y


_near.defvjp(_near_forward, _near_backward)

# Made once, so that a scan over either is compiled once.
_CHUNKS = {False: partial(_chunk, _ByHead), True: partial(_chunk, _ByChannel)}


def _spans(log_decay: Array, document: Array, axis: int) -> _Spans:
    """Of log-decays and documents, by their number in the chunk, along an axis.

    Document 0 is the one that the state is of, and the last one that which it will be of.
    """
    inclusive = jnp.cumsum(log_decay, axis)
    exclusive = inclusive - log_decay
    whole = jax.lax.slice_in_dim(inclusive, -1, None, axis=axis)
    last = jax.lax.slice_in_dim(document, -1, None, axis=axis)

    def where(seen: Array, span: Array) -> Array:
        return jnp.where(seen, span, -jnp.inf)

    flat_BC = document.reshape(document.shape[0], -1)
    return _Spans(
        after=where(document == last, whole - inclusive),
        entry=where(document == 0, inclusive),
        entry_before=where(document == 0, exclusive),
        whole=where(last == 0, whole),
        inclusive=inclusive,
        exclusive=exclusive,
        same_BCC=flat_BC[:, :, None] == flat_BC[:, None, :],
    )


def _lower(spans: _Spans, strict: bool) -> Array:
    """Which tokens a token sees, itself included or not, `[B, C, C]`."""
    return spans.same_BCC & jnp.tril(jnp.ones(spans.same_BCC.shape[1:], bool), -int(strict))


def _within(scores_BGRCC: Array, v_BGRCP: Array) -> Array:
    """What tokens of a chunk add to each other, multiplied in the dtype of the values."""
    return _dot("bgrcd,bgrdp->bgrcp", scores_BGRCC.astype(v_BGRCP.dtype), v_BGRCP)


def _dot(equation: str, x: Array, y: Array) -> Array:
    """A product of two in float32, or of two narrow ones summed in float32."""
    if x.dtype != y.dtype:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, x, y, precision=exact, preferred_element_type=jnp.float32)
